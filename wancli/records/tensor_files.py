"""Check input tensors in safetensors files by their headers, without torch.

Latents are [F, C, H, W].
"""

from pathlib import Path
from typing import Any

from wancli.catalog.geometry import LatentShape
from wancli.errors import InputError, missing
from wancli.records.record import parse_record
from wancli.utils.reading import Header, check_tensors, read_header, unreadable

LATENTS_HINT = "give a file that `save_latents` wrote"


def checkpoint_files(source: Path) -> list[Path]:
    """The files of a checkpoint: one file, or the shards in a folder. Raises InputError."""
    paths = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    if not paths:
        raise InputError(
            f"{source} has no *.safetensors in it.",
            hint="give the checkpoint's file, or the folder that its shards are in",
        )
    for path in paths:
        try:
            check_tensors(path)
        except (OSError, ValueError) as error:
            raise unreadable(path, error, hint="copy that file again") from None
    return paths


def header_of(path: Path, needed: str, *, hint: str = "") -> Header:
    """The header of a file that must hold the tensor `needed`. Raises InputError."""
    try:
        header = read_header(path)
    except FileNotFoundError:
        raise missing("file", path) from None
    except (OSError, ValueError) as error:
        raise unreadable(
            path, error, hint=hint or f"give a .safetensors file that holds {needed}"
        ) from None
    if needed not in header.tensors:
        names = ", ".join(list(header.tensors)[:3]) or "none"
        raise InputError(f"{path} has no tensor '{needed}'.", hint=hint or f"it has {names}")
    return header


def latents_shape(path: Path) -> tuple[int, int, int, int]:
    """Shape [F, C, H, W] of the latents in a file. Raises InputError."""
    latents = header_of(path, "latents", hint=LATENTS_HINT).tensors["latents"]
    if not latents.real or len(latents.shape) != 4 or 0 in latents.shape:
        raise InputError(
            f"{path}: {latents.dtype} {[*latents.shape]} are not latents [F, C, H, W].",
            hint=LATENTS_HINT,
        )
    frames, channels, height, width = latents.shape
    return frames, channels, height, width


def latents_record(path: Path) -> dict[str, Any]:
    """The record embedded in a latents file. Raises InputError."""
    header = header_of(path, "latents", hint=LATENTS_HINT)
    return parse_record(header.metadata.get("wancli", ""), origin=str(path))


def check_latents(path: Path, shape: LatentShape, *, frames: int) -> None:
    """Raise InputError unless latents are `frames` latent frames of that shape."""
    actual, wanted = latents_shape(path), (frames, shape.channels, shape.height, shape.width)
    if actual != wanted:
        raise InputError(
            f"{path}: latents {[*actual]} are not {[*wanted]}.",
            hint="set the `size` that they were generated with",
        )


def check_noise(path: Path, shape: LatentShape) -> None:
    """Raise InputError unless the noise has that latent shape, with any number of frames."""
    wanted = (shape.channels, shape.height, shape.width)
    for name, noise in header_of(path, "noise").tensors.items():
        if name in ("noise", "renoise") and not (noise.real and noise.shape[1:] == wanted):
            raise InputError(
                f"{path}: {name}, {noise.dtype} {[*noise.shape]}, is not [F, C, H, W] with "
                f"{[*wanted]}.",
                hint="see `noise_file` in wancli rollout --help",
            )


def check_embeds(path: Path, *, tokens: int, width: int, guided: bool) -> None:
    """Raise InputError unless a file holds embeddings [L, D] or [1, L, D].

    L is at most `tokens` and D is `width` (0: unknown). A `guided` run needs `negative_embeds`.
    """
    tensors = header_of(path, "prompt_embeds").tensors
    if guided and "negative_embeds" not in tensors:
        raise InputError(
            f"{path} has no negative_embeds, and guidance needs them.",
            hint="`guidance_scale 1`, or add negative_embeds to the file",
        )
    for name in tensors.keys() & {"prompt_embeds", "negative_embeds"}:
        embeds = tensors[name]
        flat = embeds.shape[-2:] == embeds.shape or embeds.shape[:-2] == (1,)
        if not embeds.real or not flat or len(embeds.shape) < 2 or 0 in embeds.shape:
            raise InputError(
                f"{path}: {name}, {embeds.dtype} {[*embeds.shape]}, is not [L, D] or [1, L, D].",
                hint="see `prompt_embeds` in wancli rollout --help",
            )
        if width and embeds.shape[-1] != width:
            raise InputError(
                f"{path}: {name} is {embeds.shape[-1]} wide; the model needs {width}.",
                hint="give those of its own text encoder",
            )
        if embeds.shape[-2] > tokens:
            raise InputError(
                f"{path}: {name} has {embeds.shape[-2]} tokens; the model needs {tokens}.",
                hint=f"`text_length {embeds.shape[-2]}`",
            )
