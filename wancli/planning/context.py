"""Input files of a rollout, checked before anything loads."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from wancli.catalog.specs import ModelSpec
from wancli.catalog.wan import Architecture
from wancli.config.settings import RolloutSettings
from wancli.errors import PlanError, PlanWarning, UsageError
from wancli.planning.input_files import check_clip, check_picture
from wancli.planning.plan import RolloutPlan
from wancli.records.tensor_files import check_embeds, check_latents, check_noise, latents_shape


@dataclass(frozen=True)
class ContextFiles:
    """Input files of a rollout: at most one of the first three, which it continues from."""

    image: Path | None = None
    extend: Path | None = None
    initial_latents: Path | None = None
    noise_file: Path | None = None  # instead of seeds
    prompt_embeds: Path | None = None  # instead of prompts

    @property
    def needs_vae(self) -> bool:
        """Whether the VAE has to encode one of them."""
        return bool(self.image or self.extend)

    def named(self) -> dict[str, Path]:
        """The files that are set, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: path for name, path in named.items() if path}


NO_FILES = ContextFiles()
ONE_FRAME = {"image", "initial_latents"}  # inputs that the first chunk may begin with


def context_frames(
    files: ContextFiles, settings: RolloutSettings, spec: ModelSpec, before: Mapping[str, Any]
) -> int:
    """Latent frames of initial context, without decoding; `before` is the request to continue.

    Raises UsageError, InputError.
    """
    if sum(path is not None for path in (files.image, files.extend, files.initial_latents)) > 1:
        raise PlanError(
            "`image`, `extend` and `initial_latents` cannot be combined.", hint="use one of them"
        )
    if files.extend:
        return clip_frames(files.extend, settings, spec)
    if files.initial_latents:
        return latents_shape(files.initial_latents)[0]
    chosen = settings.rollout
    if files.image:
        alone = chosen.independent_first_frame or chosen.image_start == "first-frame"
        return 1 if alone else chosen.chunk_frames
    if not before:
        return 0
    total = (int(before["video"]["num_frames"]) - 1) // spec.strides.temporal + 1
    generated = int(before["rollout"]["chunks"]) * int(before["rollout"]["chunk_frames"])
    within = chosen.image_start == "first-frame" and before["inputs"].keys() & ONE_FRAME
    return max(1 if within else 0, total - generated)


def clip_frames(clip: Path, settings: RolloutSettings, spec: ModelSpec) -> int:
    """Latent frames of a clip to extend. Raises UsageError if it does not match, InputError."""
    from wancli.video.read import probe

    info, video, stride = probe(clip), settings.video, spec.strides.temporal
    if (info.width, info.height) != (video.width, video.height):
        raise UsageError(
            f"{clip} is {info.width}x{info.height}; the rollout is {video.width}x{video.height}.",
            hint=f"`size {info.width}x{info.height}`, or scale the clip",
        )
    check_clip(clip.name, info, video)
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


def check_context_files(
    files: ContextFiles, plan: RolloutPlan, settings: RolloutSettings, spec: ModelSpec
) -> tuple[PlanWarning, ...]:
    """Warn of a picture that is cropped. Raises InputError for files that do not match the plan."""
    warnings: tuple[PlanWarning, ...] = ()
    if files.image:
        warnings = check_picture("image", files.image, settings.video, spec.strides)
    if files.initial_latents:
        check_latents(files.initial_latents, plan.shape, frames=plan.start_frames)
    if files.noise_file:
        check_noise(files.noise_file, plan.shape)
    if files.prompt_embeds:
        tokens = settings.rollout.text_length or spec.text_length
        is_wan = isinstance(spec.architecture, Architecture)
        width = spec.wan.transformer.text_dim if is_wan else 0
        check_embeds(files.prompt_embeds, tokens=tokens, width=width, guided=plan.guided)
    return warnings
