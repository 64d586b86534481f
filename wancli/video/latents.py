"""Latents on disk: safetensors with `latents` [F, C, H, W], and the record in the metadata."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from wancli.errors import InputError
from wancli.files import write_whole
from wancli.records import parse_record


def save_latents(latents: Tensor, path: Path, record: Mapping[str, Any]) -> None:
    """Write latents [1, C, F, H, W] whole or not at all. Raises OutputError."""
    tensors = {"latents": latents[0].transpose(0, 1).float().cpu().contiguous()}
    content = save(tensors, metadata={"wancli": json.dumps(record)})
    write_whole(path, content, hint="choose another place: --save-latents FILE")


def read_latents(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Latents [1, C, F, H, W] and their record. Raises InputError."""
    try:
        with safe_open(path, framework="pt") as file:
            latents, metadata = file.get_tensor("latents"), file.metadata() or {}
    except FileNotFoundError:
        raise InputError(f"latents '{path}' not found.", hint="ls *.safetensors") from None
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} is not a latents file: {str(error).splitlines()[0]}",
            hint="give a file that --save-latents wrote",
        ) from None
    record = parse_record(metadata.get("wancli", ""), origin=str(path))
    if latents.ndim != 4 or not torch.isfinite(latents).all():
        raise InputError(
            f"{path}: latents {tuple(latents.shape)} are not finite [F, C, H, W].",
            hint="give a file that --save-latents wrote",
        )
    return latents.transpose(0, 1)[None], record
