"""Inputs of a rollout: prompts, initial context, and tensors for research."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import pad

from wancli.catalog.geometry import Span
from wancli.config.settings import RolloutSettings
from wancli.errors import InputError
from wancli.models.load import Loaded
from wancli.models.vae import encode_image, encode_video
from wancli.planning.plan import RolloutPlan
from wancli.planning.prompts import PromptSchedule
from wancli.records.tensor_files import header_of
from wancli.rollouts.denoiser import PromptPair
from wancli.rollouts.loop import ChunkPrompt
from wancli.utils.reading import unreadable
from wancli.video.images import read_image
from wancli.video.read import read_frames


@dataclass(frozen=True)
class InitialContext:
    """Files that a rollout continues from; at most one of them is set."""

    image: Path | None = None
    clip: Path | None = None
    latents: Path | None = None

    @property
    def needs_vae(self) -> bool:
        """Whether the VAE has to encode it."""
        return bool(self.image or self.clip)


@dataclass(frozen=True)
class ResearchTensors:
    """Tensor files that replace seeds and prompts."""

    noise: Path | None = None
    embeds: Path | None = None


class PromptEncoder:
    """Embeddings of a schedule's prompts, blended for each chunk."""

    def __init__(
        self,
        loaded: Loaded,
        settings: RolloutSettings,
        tensors: ResearchTensors,
        schedule: PromptSchedule,
    ) -> None:
        self._loaded, self._settings, self._tensors = loaded, settings, tensors
        self._schedule = schedule
        self._embeddings: dict[str, Tensor] = {}
        self._uncond: Tensor | None = None
        self._current: tuple[tuple[str, str, float], PromptPair] | None = None

    def encode(self) -> None:
        """Embed every prompt; call it before the first chunk."""
        rollout, sampling = self._settings.rollout, self._settings.sampling
        length = rollout.text_length or self._loaded.spec.text_length
        guided = rollout.sampler == "unipc" and sampling.guidance_scale > 1
        if self._tensors.embeds:
            cond, uncond = read_embeds(self._tensors.embeds, length=length)
            self._embeddings = {self._schedule.prompt: self._on_device(cond)}
        else:
            prompts = {self._schedule.prompt, *(c.prompt for c in self._schedule.changes)}
            self._embeddings = {text: self._embed(text, length) for text in sorted(prompts)}
            uncond = self._embed(sampling.negative_prompt, length) if guided else None
        self._uncond = self._on_device(uncond) if guided and uncond is not None else None

    def of_chunk(self, span: Span) -> ChunkPrompt:
        """Prompts of a chunk. The same tensors while the wording lasts: their K/V is reused."""
        wording = self._schedule.at(span.index)
        key = (wording.old, wording.new, wording.share)
        if self._current is None or self._current[0] != key:
            old, new = self._embeddings[wording.old], self._embeddings[wording.new]
            cond = new if wording.share == 1 else torch.lerp(old, new, wording.share)
            self._current = (key, PromptPair(cond, self._uncond))
        return ChunkPrompt(
            self._current[1], recache=wording.changes and self._settings.rollout.recache
        )

    def _embed(self, text: str, length: int) -> Tensor:
        with torch.no_grad():
            embeddings: Tensor = self._loaded.pipeline.encode_prompt(
                text, do_classifier_free_guidance=False, max_sequence_length=length
            )[0]
        return embeddings

    def _on_device(self, embeddings: Tensor) -> Tensor:
        return embeddings.to(self._loaded.device)


def read_context(context: InitialContext, loaded: Loaded, plan: RolloutPlan) -> Tensor:
    """Clean latents [1, C, F, H, W] to continue from. Raises InputError."""
    frames = plan.context[-1].end
    shape = (1, plan.shape.channels, frames, plan.shape.height, plan.shape.width)
    stride = loaded.spec.strides.spatial
    size = (plan.shape.width * stride, plan.shape.height * stride)
    if context.latents:
        latents = read_tensors(context.latents, "latents")["latents"]
        latents = latents.transpose(0, 1)[None].float()
    elif context.image:
        image = read_image(context.image, size=size)
        latents = encode_image(loaded.pipeline.vae, image, latent_frames=frames)
    elif context.clip:
        latents = encode_video(loaded.pipeline.vae, read_frames(context.clip))
    else:
        raise ValueError("there is no initial context")
    if tuple(latents.shape) != shape:
        raise InputError(
            f"{context.latents or context.clip}: latents {[*latents.shape]} are not {[*shape]}.",
            hint="the `size` that they were generated with",
        )
    return latents


def read_noise(path: Path) -> tuple[Tensor, Tensor | None]:
    """`noise` [F, C, H, W] and, if present, `renoise` [N, C, H, W]. Raises InputError."""
    tensors = read_tensors(path, "noise")
    return tensors["noise"], tensors.get("renoise")


def read_embeds(path: Path, *, length: int) -> tuple[Tensor, Tensor | None]:
    """`prompt_embeds` and optional `negative_embeds`, zero-padded to [1, length, D]."""
    tensors = read_tensors(path, "prompt_embeds")

    def padded(name: str) -> Tensor | None:
        if name not in tensors:
            return None
        rows = tensors[name].float().flatten(0, -2)  # [L, D] or [1, L, D]
        return pad(rows, (0, 0, 0, length - len(rows)))[None]

    cond = padded("prompt_embeds")
    assert cond is not None  # noqa: S101 - read_tensors requires it
    return cond, padded("negative_embeds")


def read_tensors(path: Path, required: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file, `required` among them. Raises InputError."""
    header_of(path, required)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error, hint=f"a file that holds {required}") from None
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():
            raise InputError(f"{path}: {name} is not finite.", hint="create the file again")
    return tensors
