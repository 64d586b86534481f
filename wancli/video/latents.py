"""Latents on disk: safetensors with `latents` [F, C, H, W], and the record in the metadata."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from wancli.errors import InputError, OutputError, RunError
from wancli.files import write_whole
from wancli.reading import unreadable
from wancli.tensor_files import LATENTS_HINT, latents_record, latents_shape


def save_latents(latents: Tensor, path: Path, record: Mapping[str, Any]) -> None:
    """Write latents [1, C, F, H, W] whole or not at all. Raises OutputError."""
    tensors = {"latents": latents[0].transpose(0, 1).float().cpu().contiguous()}
    content = save(tensors, metadata={"wancli": json.dumps(record)})
    write_whole(path, content, hint="choose another place: --save-latents FILE")


@contextmanager
def keeping(latents: Tensor | None, path: Path, record: Mapping[str, Any]) -> Iterator[None]:
    """When decoding or writing fails in the block the latents are kept, and the error says where.

    The hint of a RunError has flags under which they decode.
    """
    try:
        yield
    except (OutputError, RunError) as error:
        kept = None if latents is None else keep_latents(latents, path, record)
        if kept is None:
            raise
        flags = f" {error.hint}" if isinstance(error, RunError) else ""
        hint = f"latents kept: wancli decode {kept} -o NAME.mp4{flags}"
        raise type(error)(str(error), hint=hint) from error


def keep_latents(latents: Tensor, path: Path, record: Mapping[str, Any]) -> Path | None:
    """Save latents beside the video that could not be written, or else in the temporary folder."""
    name = f"{path.stem[:80]}.latents.safetensors"
    for folder in (path.parent, Path(tempfile.gettempdir())):
        try:
            save_latents(latents, folder / name, record)
        except OutputError:
            continue
        return folder / name
    return None


def read_latents(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Latents [1, C, F, H, W] and their record. Raises InputError."""
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
