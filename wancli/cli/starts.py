"""What a rollout starts from, looked at before anything loads."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from wancli.errors import InputError, PlanError, UsageError, missing
from wancli.files import weights_header
from wancli.settings import RolloutSettings
from wancli.specs import ModelSpec


@dataclass(frozen=True)
class Starts:
    """Files that decide what comes out."""

    image: Path | None = None
    extend: Path | None = None
    initial_latents: Path | None = None
    noise_file: Path | None = None
    prompt_embeds: Path | None = None

    def named(self) -> dict[str, Path]:
        """Those that are given."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: path for name, path in named.items() if path}


def context_frames(
    starts: Starts, settings: RolloutSettings, spec: ModelSpec, before: Mapping[str, Any]
) -> int:
    """Latent frames that are given, without decoding anything; `before` is an earlier request.

    Raises UsageError, InputError.
    """
    given = [path for path in (starts.image, starts.extend, starts.initial_latents) if path]
    if len(given) > 1:
        raise PlanError(
            "--image, --extend and --initial-latents are three ways to start.", hint="give one"
        )
    if starts.extend:
        return clip_frames(starts.extend, settings, spec)
    if starts.initial_latents:
        return latent_frames(starts.initial_latents)
    chosen = settings.rollout
    if starts.image:
        return 1 if chosen.independent_first_frame else chosen.chunk_frames
    if not before:
        return 0
    everything = (int(before["video"]["num_frames"]) - 1) // spec.strides.temporal + 1
    made = int(before["rollout"]["chunks"]) * int(before["rollout"]["chunk_frames"])
    return max(0, everything - made)


def clip_frames(clip: Path, settings: RolloutSettings, spec: ModelSpec) -> int:
    """Latent frames of a clip that is as the rollout will be. Raises UsageError, InputError."""
    from wancli.video.read import probe

    info, video, stride = probe(clip), settings.video, spec.strides.temporal
    if (info.width, info.height) != (video.width, video.height):
        raise UsageError(
            f"{clip} is {info.width}x{info.height}, the rollout {video.width}x{video.height}.",
            hint=f"--size {info.width}x{info.height}, or scale the clip",
        )
    if abs(info.fps - video.fps) > 0.02:
        raise UsageError(
            f"{clip} has {info.fps:g} video frames a second, the rollout {video.fps}.",
            hint=f"--fps {info.fps:g}, or convert the clip",
        )
    chunk = settings.rollout.chunk_frames
    alone = 1 if settings.rollout.independent_first_frame else 0
    latents = (info.frames - 1) // stride + 1
    chunks = (latents - alone) // chunk
    fitting = (alone + chunks * chunk - 1) * stride + 1
    if info.frames != fitting or chunks < 1:
        least = (alone + max(chunks, 1) * chunk - 1) * stride + 1
        raise UsageError(
            f"{clip} has {info.frames} video frames, which do not fill chunks of {chunk} latents.",
            hint=f"cut it to {least} (or {least + chunk * stride}) video frames",
        )
    return latents


def latent_frames(path: Path) -> int:
    """Latent frames in a safetensors file, from its header alone. Raises InputError."""
    try:
        _, header = weights_header(path)
        return int(header["latents"]["shape"][0])
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"cannot read latents [F, C, H, W] from {path}: {error}.",
            hint="give a file that --save-latents wrote",
        ) from None


def digest(kind: str, path: Path) -> str:
    """SHA-256 of a file. Raises InputError."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise missing(kind, path) from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}.", hint="check the path") from None
