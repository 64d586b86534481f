"""Dependencies in pyproject.toml are what wancli imports."""

import ast
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
# Used by diffusers on our behalf: prompts are cleaned by ftfy.
INDIRECT = {"ftfy"}


def declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}


def optional() -> set[str]:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [text for extra in extras["optional-dependencies"].values() for text in extra]
    return {canonicalize_name(Requirement(text).name) for text in texts}


@cache
def imported() -> set[str]:
    modules = set()
    for path in (ROOT / "wancli").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules.add(node.module.partition(".")[0])
    third_party = modules - sys.stdlib_module_names - {"wancli"}
    distributions = packages_distributions()
    return {canonicalize_name(distributions.get(name, [name])[0]) for name in third_party}


def test_every_imported_package_is_declared():
    assert imported() - declared() <= optional()


def test_every_declared_package_is_used():
    assert declared() - imported() == INDIRECT
