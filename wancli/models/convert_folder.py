"""Model folders that are whole, or not there."""

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from wancli.catalog.local import read_config, spec_of_folder
from wancli.errors import ModelError, UsageError

_BASE = ("model_index.json", "vae", "text_encoder", "tokenizer", "scheduler")
_WHOLE = {"transformer", *_BASE}


def check_target(out: Path, *, sources: Iterable[Path], overwrite: bool) -> None:
    """Refuse an `out` that must not be replaced. Raises UsageError.

    Only a folder such as we write may be, and none that anything is read from.
    """
    if out.is_symlink():
        raise UsageError(f"{out} is a symbolic link, and stays.", hint="use another folder")
    if not out.exists():
        return
    if not overwrite:
        raise UsageError(f"{out} exists.", hint="--overwrite, or another folder")
    foreign = sorted({path.name for path in out.iterdir()} - _WHOLE) if out.is_dir() else ["a file"]
    if foreign:
        raise UsageError(
            f"{out} is not a converted model, and stays: {foreign[0]}.", hint="use another folder"
        )
    for source in sources:
        if source.resolve().is_relative_to(out.resolve()):
            raise UsageError(
                f"{out} holds {source}, which would be lost.", hint="use another folder"
            )


def check_base(base: Path, sizes: Mapping[str, Any]) -> None:
    """Raise ModelError where `base` lacks a part, or its parts do not fit a config's `sizes`."""
    if spec_of_folder(base).experts > 1:
        raise ModelError(
            f"{base} has two transformers; a checkpoint is one.",
            hint="--base with a model of one transformer",
        )
    if lost := [part for part in _BASE if not (base / part).exists()]:
        raise ModelError(f"{base} has no {lost[0]}.", hint="copy that model again")
    pairs = (("vae", "z_dim", "out_channels"), ("text_encoder", "d_model", "text_dim"))
    for part, theirs, ours in pairs:
        width = read_config(base, f"{part}/config.json").get(theirs)
        if width != sizes[ours]:
            raise ModelError(
                f"{base / part} has {theirs} {width}; the checkpoint has {ours} {sizes[ours]}.",
                hint="--base with the model that the checkpoint was made from",
            )


def copy_parts(base: Path, folder: Path) -> None:
    """Put all of `base` but its transformer into `folder`, as hard links where there can be."""
    for part in _BASE:
        if (base / part).is_dir():
            shutil.copytree(base / part, folder / part, copy_function=_link)
        else:
            _link(base / part, folder / part)


def _link(source: Path | str, target: Path | str) -> None:
    try:
        os.link(os.path.realpath(source), target)  # the hub's cache is made of symbolic links
    except OSError:
        shutil.copy2(source, target)
