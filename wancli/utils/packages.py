"""Which packages are installed, without importing them."""

import re
from importlib.metadata import PackageNotFoundError, version

from wancli.errors import SetupError


def package_version(name: str) -> str:
    """The installed version, or ""."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def check_package(name: str, least: tuple[int, ...], *, asked: str) -> None:
    """Raise SetupError where a package that was `asked` for is missing, or older than `least`."""
    needed, found = ".".join(map(str, least)), package_version(name)
    hint = f"pip install '{name}>={needed}'"
    if not found:
        raise SetupError(f"{asked} needs {name}.", hint=hint)
    if tuple(int(part) for part in re.findall(r"\d+", found)[: len(least)]) < least:
        raise SetupError(f"{asked} needs {name} {needed}, not {found}.", hint=hint)
