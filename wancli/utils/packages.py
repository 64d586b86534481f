"""Versions of installed packages, without importing them."""

import logging
import re
from functools import cache

from wancli.errors import SetupError


@cache
def version(name: str) -> str:
    """The installed version. Raises PackageNotFoundError."""
    from importlib.metadata import version as installed_version  # slow, and rarely needed

    return installed_version(name)


def package_version(name: str) -> str:
    """The installed version, or ""."""
    from importlib.metadata import PackageNotFoundError

    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def check_package(name: str, least: tuple[int, ...], *, needed_by: str) -> None:
    """Raise SetupError if a package that `needed_by` needs is missing or older than `least`.

    The hint installs the package itself: an extra's name is one for pip only where wancli is on an
    index, or in its clone.
    """
    needed, installed = ".".join(map(str, least)), package_version(name)
    hint = f"pip install '{name}>={needed}'"
    if not installed:
        raise SetupError(f"{needed_by} needs {name}.", hint=hint)
    if tuple(int(part) for part in re.findall(r"\d+", installed)[: len(least)]) < least:
        raise SetupError(f"{needed_by} needs {name} {needed}, not {installed}.", hint=hint)


def silence_torchao() -> None:
    """Hide the warnings that importing torchao causes, which diffusers does by itself.

    They are about kernels and checkpoints that wancli does not use, and come from three libraries.
    """
    importer = "diffusers.quantizers.torchao.torchao_quantizer"
    for name in ("torchao", "torch.utils._pytree", importer):
        logging.getLogger(name).setLevel(logging.ERROR)
