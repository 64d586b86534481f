"""The target folder of a conversion, and the components copied into it from a base model."""

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from wancli.catalog.local import read_config, spec_of_folder
from wancli.errors import ModelError, UsageError

_BASE = ("model_index.json", "vae", "text_encoder", "tokenizer", "scheduler")
_PARTS = {"transformer", *_BASE}


def check_target(out: Path, *, sources: Iterable[Path], overwrite: bool) -> None:
    """Raise UsageError if `out` must not be replaced.

    Only a converted folder may be, and only if no source is inside it.
    """
    if out.is_symlink():
        raise UsageError(
            f"{out} is a symbolic link and is not replaced.", hint="use another folder"
        )
    if not out.exists():
        return
    if not overwrite:
        raise UsageError(f"{out} exists.", hint="`overwrite`, or another folder")
    if not out.is_dir():
        raise UsageError(f"{out} is a file and is not replaced.", hint="use another folder")
    if foreign := sorted({path.name for path in out.iterdir()} - _PARTS):
        raise UsageError(
            f"{out} is not a converted model and is not replaced: it holds {foreign[0]}.",
            hint="use another folder",
        )
    for source in sources:
        if source.resolve().is_relative_to(out.resolve()):
            raise UsageError(
                f"{out} holds {source}, which would be deleted.", hint="use another folder"
            )


def check_base(base: Path, sizes: Mapping[str, Any]) -> None:
    """Raise ModelError if `base` lacks a component, or one does not match the config `sizes`."""
    if spec_of_folder(base).experts > 1:
        raise ModelError(
            f"{base} has two transformers; a checkpoint has one.",
            hint="`base` with a model of one transformer",
        )
    if lost := [part for part in _BASE if not (base / part).exists()]:
        raise ModelError(f"{base} has no {lost[0]}.", hint="copy that model again")
    widths = (("vae", "z_dim", "out_channels"), ("text_encoder", "d_model", "text_dim"))
    for part, key, own_key in widths:
        width = read_config(base, f"{part}/config.json").get(key)
        if width != sizes[own_key]:
            raise ModelError(
                f"{base / part} has {key} {width}; the checkpoint has {own_key} {sizes[own_key]}.",
                hint="`base` with the model that the checkpoint was made from",
            )


def copy_parts(base: Path, folder: Path) -> None:
    """Copy all components of `base` but its transformer, as hard links where possible."""
    for part in _BASE:
        if (base / part).is_dir():
            shutil.copytree(base / part, folder / part, copy_function=_link)
        else:
            _link(base / part, folder / part)


def _link(source: Path | str, target: Path | str) -> None:
    try:
        os.link(os.path.realpath(source), target)  # the hub cache consists of symbolic links
    except OSError:
        shutil.copy2(source, target)
