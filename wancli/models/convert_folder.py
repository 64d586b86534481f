"""The target folder of a conversion, and the components copied into it from a base model."""

import os
import shutil
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from wancli.catalog.local import read_config, spec_of_folder
from wancli.errors import ModelError, UsageError
from wancli.utils.files import files_in

_BASE = ("model_index.json", "vae", "text_encoder", "tokenizer", "scheduler")
# Files of a converted model, as diffusers and transformers name them.
_WEIGHTS = "diffusion_pytorch_model*.safetensors*"  # and the index of shards
_FILES = {
    ".": ("model_index.json",),
    "transformer": ("config.json", _WEIGHTS),
    "vae": ("config.json", _WEIGHTS),
    "text_encoder": ("*config.json", "model*.safetensors*"),
    "tokenizer": ("*token*.json", "*.model", "vocab.*", "merges.txt"),
    "scheduler": ("scheduler_config.json",),
}


def check_target(out: Path, *, sources: Iterable[Path], overwrite: bool) -> None:
    """Raise UsageError if `out` must not be replaced.

    Only a converted folder may be, without other files in it, and only if no source is inside it.
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
    files = (path.relative_to(out) for path in files_in(out))
    if foreign := sorted(path for path in files if not _is_of_model(path)):
        raise UsageError(
            f"{out} holds {foreign[0]}, which is not of a converted model, and is not replaced.",
            hint="use another folder",
        )
    for source in sources:
        if source.resolve().is_relative_to(out.resolve()):
            raise UsageError(
                f"{out} holds {source}, which would be deleted.", hint="use another folder"
            )


def _is_of_model(path: Path) -> bool:
    """Whether a path inside a model folder is that of a file of the model."""
    return any(fnmatchcase(path.name, name) for name in _FILES.get(str(path.parent), ()))


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
