"""Imports between packages go one way, light packages never load torch, one module prints."""

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "wancli"
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
# Each may import those before it. The light ones answer in milliseconds: they never import torch.
LIGHT = ("errors", "utils", "catalog", "config", "records")
ORDER = (
    *LIGHT, "video", "planning", "cost", "caching", "models", "generation", "rollouts",
    "api", "batches", "doctor", "benchmark", "demo", "cli", "__init__", "__main__",
)  # fmt: skip
LIGHT_PACKAGES = {*LIGHT, "planning", "cost", "cli", "__init__", "__main__"}
HEAVY = {"torch", "diffusers", "transformers", "numpy", "cache_dit", "huggingface_hub"}
ONLY_IMPORTER = {"cache_dit": "caching/step_cache.py", "ray": "batches/ray_driver.py"}
PRINTING = {"cli/screen.py", "cli/messages.py", "cli/streams.py"}


def package_of(name: str) -> str:
    """`cli/app.py` is of cli, `errors.py` of errors."""
    return name.removesuffix(".py").split("/")[0]


@cache
def nodes(tree: ast.AST) -> list[ast.AST]:
    return list(ast.walk(tree))


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of every import, wherever it stands; `from a import b` gives a.b."""
    for node in nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages_imported(tree: ast.AST) -> set[str]:
    """The packages of wancli that a module imports from."""
    names = (name.split(".") for name in imported(tree))
    return {name[1] for name in names if name[0] == "wancli" and len(name) > 1}


def upward(tree: ast.AST, *, package: str) -> list[str]:
    """Packages that a module of `package` imports and may not."""
    rank = {name: number for number, name in enumerate(ORDER)}
    targets = packages_imported(tree) - {package}
    return sorted(name for name in targets if rank[name] >= rank[package])


def prints(tree: ast.AST) -> list[str]:
    """Writes to the standard streams, as they are spelt."""
    called = [node.func for node in nodes(tree) if isinstance(node, ast.Call)]
    functions = {"print", "typer.echo", "typer.secho", "rich.print", "pprint", "input"}
    streams = {"sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__"}
    attributes = [node for node in nodes(tree) if isinstance(node, ast.Attribute)]
    return sorted((spelt(called) & functions) | (spelt(attributes) & streams))


def spelt(names: Iterable[ast.AST]) -> set[str]:
    """Names of one or two words."""
    simple = (ast.Name, ast.Attribute)
    return {
        ast.unparse(name) for name in names
        if isinstance(name, simple) and isinstance(getattr(name, "value", name), ast.Name)
    }  # fmt: skip


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def test_imports_point_down_the_order(trees):
    wrong = {name: upward(tree, package=package_of(name)) for name, tree in trees.items()}
    assert {name: packages for name, packages in wrong.items() if packages} == {}


def test_a_light_package_imports_nothing_heavy(trees):
    light = {name: tree for name, tree in trees.items() if package_of(name) in LIGHT_PACKAGES}
    heavy = {n: {i.split(".")[0] for i in imported(tree)} & HEAVY for n, tree in light.items()}
    assert len(light) > 50
    assert {name: libraries for name, libraries in heavy.items() if libraries} == {}


def test_a_library_that_patches_has_one_importer(trees):
    homes = [
        (library, name)
        for name, tree in trees.items()
        for library in {i.split(".")[0] for i in imported(tree)} & set(ONLY_IMPORTER)
    ]
    assert dict(homes) == ONLY_IMPORTER
    assert len(homes) == len(ONLY_IMPORTER)


def test_only_the_screen_prints(trees):
    printed = {name: prints(tree) for name, tree in trees.items() if name not in PRINTING}
    assert {name: calls for name, calls in printed.items() if calls} == {}


def test_class_names_are_unique(trees):
    classes = [
        node.name for tree in trees.values() for node in nodes(tree)
        if isinstance(node, ast.ClassDef)
    ]  # fmt: skip
    assert sorted(name for name in set(classes) if classes.count(name) > 1) == []


def test_the_package_has_few_entries_and_each_folder_a_docstring():
    entries = [p for p in PACKAGE.iterdir() if p.name != "__pycache__"]
    assert len(entries) <= 21, sorted(p.name for p in entries)
    for folder in (p for p in entries if p.is_dir()):
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert text, folder
        assert len(text.splitlines()) <= 4, folder


def diagram(trees: dict[str, ast.Module]) -> str:
    """A line per package: what it imports, without what follows from that."""
    arrows: dict[str, set[str]] = {}
    for name, tree in trees.items():
        source = package_of(name)
        if not source.startswith("__"):
            arrows.setdefault(source, set()).update(packages_imported(tree) - {source})
    reach: dict[str, set[str]] = {}
    for package in ORDER[:-1]:
        direct = arrows.get(package, set())
        reach[package] = direct.union(*(reach[target] for target in direct))
    lines = []
    for package in reversed(ORDER[:-1]):
        direct = arrows.get(package, set())
        beyond = set().union(*(reach[target] for target in direct))
        if shown := ", ".join(sorted(direct - beyond)):
            lines.append(f"{package:10} → {shown}")
    return "\n".join(lines)


def test_the_architecture_diagram_is_current(trees):
    drawn = re.search(r"```text\n(.*?)\n```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert drawn is not None
    assert drawn[1] == diagram(trees)


@pytest.mark.parametrize(
    "line",
    [
        "import wancli.cli.screen",
        "import wancli.cli as c",
        "from wancli import cli",
        "from wancli.cli.screen import Screen",
        "def f():\n    from wancli.cli import screen",
        "from wancli import planning, errors",
    ],
)
def test_an_upward_import_is_detected_in_every_spelling(line):
    assert upward(ast.parse(line), package="config") != []


@pytest.mark.parametrize("line", ["print(1)", "sys.stdout.write('x')", "typer.echo('x')"])
def test_printing_is_detected_in_every_spelling(line):
    assert prints(ast.parse(line)) != []
