"""Constraints for pip: the lowest versions that pyproject.toml allows, and its tools as tested."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def constraints() -> list[str]:
    """`name>=1.2` as `name==1.2`; what has no lower bound, a tool, as in constraints.txt."""
    described = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = described["project"]
    asked = [*described["build-system"]["requires"], *project["dependencies"]]
    asked += [text for extra in project["optional-dependencies"].values() for text in extra]
    tested = (ROOT / "constraints.txt").read_text().splitlines()
    lowest = [text.replace(">=", "==") for text in asked if ">=" in text]
    return lowest + [line for line in tested if line.partition("==")[0] in asked]


if __name__ == "__main__":
    print("\n".join(constraints()))  # noqa: T201 - into a file
