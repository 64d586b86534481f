"""Versions of installed packages, without importing them."""

import logging
import re

from wancli.errors import SetupError


def package_version(name: str) -> str:
    """The installed version, or ""."""
    from importlib.metadata import PackageNotFoundError, version  # slow, and rarely needed

    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def check_package(name: str, least: tuple[int, ...], *, needed_by: str) -> None:
    """Raise SetupError if a package that `needed_by` needs is missing or older than `least`."""
    needed, installed = ".".join(map(str, least)), package_version(name)
    hint = f"pip install '{name}>={needed}'"
    if not installed:
        raise SetupError(f"{needed_by} needs {name}.", hint=hint)
    if tuple(int(part) for part in re.findall(r"\d+", installed)[: len(least)]) < least:
        raise SetupError(f"{needed_by} needs {name} {needed}, not {installed}.", hint=hint)


def silence_torchao() -> None:
    """Hide what torchao logs when diffusers imports it: warnings about kernels that nobody uses."""
    logging.getLogger("torchao").setLevel(logging.ERROR)
