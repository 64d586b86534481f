"""Constraints for pip: the lowest versions that pyproject.toml allows, and tested tools."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def constraints() -> list[str]:
    """`name>=1.2` becomes `name==1.2`; tools, which have no lower bound, as in constraints.txt."""
    described = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = described["project"]
    required = [*described["build-system"]["requires"], *project["dependencies"]]
    required += [text for extra in project["optional-dependencies"].values() for text in extra]
    tested = (ROOT / "constraints.txt").read_text().splitlines()
    lowest = [text.replace(">=", "==") for text in required if ">=" in text]
    return lowest + [line for line in tested if line.partition("==")[0] in required]


if __name__ == "__main__":
    print("\n".join(constraints()))  # noqa: T201 - into a file
