"""Latents on disk: safetensors with `latents` [F, C, H, W], and the record in the metadata."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from wancli.errors import CapacityError, DecodeError, InputError, OutputError
from wancli.records.record import is_same_video
from wancli.records.tensor_files import (
    LATENTS_HINT,
    latents_record,
    latents_shape,
)
from wancli.utils.files import names_beside, write_beside, write_whole
from wancli.utils.reading import read_header, unreadable


def save_latents(
    latents: Tensor, path: Path, record: Mapping[str, Any], *, overwrite: bool = False
) -> None:
    """Write latents [1, C, F, H, W] atomically. Raises OutputError."""
    hint = "choose another place: `save_latents FILE`"
    write_whole(path, _packed(latents, record), hint=hint, overwrite=overwrite)


def _packed(latents: Tensor, record: Mapping[str, Any], **metadata: str) -> bytes:
    tensors = {"latents": latents[0].transpose(0, 1).float().cpu().contiguous()}
    return save(tensors, metadata={"wancli": json.dumps(record), **metadata})


@contextmanager
def keeping(latents: Tensor | None, path: Path | None, record: Mapping[str, Any]) -> Iterator[None]:
    """If decoding or writing fails in the block, save the latents and say where in the error.

    Hints of DecodeError and CapacityError are settings to decode them with. Without the `path` of a
    video nothing is saved.
    """
    try:
        yield
    except (OutputError, DecodeError, CapacityError) as error:
        if latents is None or path is None:
            raise
        saved = keep_latents(latents, path, record)
        if saved is None:
            raise
        flags = "" if isinstance(error, OutputError) else f" {error.hint}"
        hint = f"latents kept: wancli decode {saved} -o NAME.mp4{flags}"
        raise type(error)(str(error), hint=hint) from error


def keep_latents(latents: Tensor, path: Path, record: Mapping[str, Any]) -> Path | None:
    """Save latents under a free name beside the failed video, or else in the temporary folder."""
    content = _packed(latents, record, kept_of=str(path.absolute()))
    for file in _kept_files(path):
        with suppress(OutputError):
            return write_beside(file, content, hint="free some space")
    return None


def drop_kept_latents(path: Path, request: Mapping[str, Any]) -> None:
    """Remove latents that were kept of a video which failed, and is whole under that name now.

    Those of another request stay, and those that somebody else named.
    """
    for file in (name for first in _kept_files(path) for name in names_beside(first)):
        with suppress(InputError, OSError, ValueError):
            owner = read_header(file).metadata.get("kept_of")  # whose errors suggest no other names
            if owner == str(path.absolute()) and is_same_video(
                latents_record(file)["request"], request
            ):
                file.unlink()


def _kept_files(path: Path) -> list[Path]:
    """Where the latents of a video are kept, the first choice first."""
    name = f"{path.stem[:80]}.latents.safetensors"
    return [folder / name for folder in (path.parent, Path(tempfile.gettempdir()))]


def read_latents(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Read latents [1, C, F, H, W] and their record. Raises InputError."""
    latents_shape(path)
    record = latents_record(path)
    try:
        with safe_open(path, framework="pt") as file:
            latents = file.get_tensor("latents").float()
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error, hint=LATENTS_HINT) from None
    if not torch.isfinite(latents).all():
        raise InputError(f"{path}: its latents are not finite.", hint=LATENTS_HINT)
    return latents.transpose(0, 1)[None], record
