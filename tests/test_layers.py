"""The tree of house.md holds: imports point up it, its top never loads torch, one module prints."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "wancli"
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = (
    {"errors", "interrupts"},
    {"reading"},
    {
        "architectures",
        "files",
        "locks",
        "geometry",
        "hub_cache",
        "packages",
        "hunyuan",
        "pages",
        "part_schema",
        "schedule",
        "settings",
        "tasks",
        "threads",
    },
    {"configs", "lora", "machine", "outputs", "resolve", "transformer_cost"},
    {"vae_cost", "hardware", "presets", "record_schema", "specs", "step_caches"},
    {"inputs", "needs", "random_models"},
    {"hunyuan_cost", "offload"},
    {"families", "folders", "vocabulary"},
    {"plan", "records"},
    {"inventory", "tensor_files", "wan_cost"},
    {"cost"},
    {"estimate"},
    {"sampling"},
    {"caching"},
    {"models", "video"},
    {"pipeline"},
    {"batch", "bench", "demo", "doctor"},
    {"cli"},
    {"__main__"},  # python -m wancli
)
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}
HEAVY = {"torch", "diffusers", "transformers", "numpy", "cache_dit", "huggingface_hub"}
ONLY_IMPORTER = {"cache_dit": "caching/steps.py", "ray": "batch/ray.py"}
PRINTING = ("cli/screen.py", "cli/streams.py")

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: name_of(path))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of every import, wherever it stands; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wrong_imports(tree: ast.AST, *, here: str) -> list[str]:
    """Imports of wancli that `here` may not make."""
    names = (name.split(".") for name in imported(tree))
    parts = {name[1] for name in names if name[0] == "wancli" and len(name) > 1}
    return sorted(there for there in parts - {here} if RANK[there] >= RANK[here])


def prints(tree: ast.AST) -> list[str]:
    """What writes to the standard streams, as it is spelt."""
    calls = (ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call))
    talk = {"print", "typer.echo", "typer.secho", "rich.print", "pprint", "input"}
    streams = {"sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__"}
    spelt = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return sorted(talk.intersection(calls) | streams.intersection(spelt))


@every_file
def test_imports_point_up_the_tree(path):
    if part_of(path) == "__init__":
        assert list(imported(ast.parse(path.read_text()))) == []
        return
    assert part_of(path) in RANK, "give it a place in LAYERS and in house.md"
    assert wrong_imports(ast.parse(path.read_text()), here=part_of(path)) == []


@every_file
def test_the_top_level_and_the_command_line_import_nothing_heavy(path):
    if path.parent not in (PACKAGE, PACKAGE / "cli"):
        return
    found = {name.split(".")[0] for name in imported(ast.parse(path.read_text()))}
    assert found & HEAVY == set()


@every_file
def test_a_heavy_library_has_one_importer(path):
    found = {name.split(".")[0] for name in imported(ast.parse(path.read_text()))}
    wrong = [library for library, home in ONLY_IMPORTER.items() if home != name_of(path)]
    assert found.intersection(wrong) == set()


@every_file
def test_only_the_screen_prints(path):
    if name_of(path) in PRINTING:
        return
    assert prints(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "line",
    [
        "import wancli.cli.screen",
        "import wancli.cli as c",
        "from wancli import cli",
        "from wancli.cli.screen import Screen",
        "def f():\n    from wancli.cli import screen",
        "from wancli import plan, errors",
    ],
)
def test_a_wrong_import_is_seen_in_every_spelling(line):
    assert wrong_imports(ast.parse(line), here="presets") != []


@pytest.mark.parametrize("line", ["print(1)", "sys.stdout.write('x')", "typer.echo('x')"])
def test_printing_is_seen_in_every_spelling(line):
    assert prints(ast.parse(line)) != []
