"""What a rollout is given: prompts, a start to go on from, and the inputs of research."""

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
from wancli.rollout.denoiser import PromptPair
from wancli.rollout.loop import ChunkPrompt
from wancli.utils.reading import unreadable
from wancli.video.images import read_image
from wancli.video.read import read_frames


@dataclass(frozen=True)
class InitialContext:
    """What a rollout goes on from; at most one of them."""

    image: Path | None = None
    clip: Path | None = None
    latents: Path | None = None

    @property
    def needs_vae(self) -> bool:
        """Whether it has to be encoded."""
        return bool(self.image or self.clip)


@dataclass(frozen=True)
class ResearchTensors:
    """Tensors instead of seeds and prompts."""

    noise: Path | None = None
    embeds: Path | None = None


class PromptEncoder:
    """The embeddings of a schedule's prompts, and what every chunk is told of them."""

    def __init__(
        self,
        loaded: Loaded,
        settings: RolloutSettings,
        inputs: ResearchTensors,
        schedule: PromptSchedule,
    ) -> None:
        self._loaded, self._settings, self._inputs = loaded, settings, inputs
        self._schedule = schedule
        self._embedded: dict[str, Tensor] = {}
        self._uncond: Tensor | None = None
        self._now: tuple[tuple[str, str, float], PromptPair] | None = None

    def encode(self) -> None:
        """Embed every prompt, before the first chunk."""
        rollout, sampling = self._settings.rollout, self._settings.sampling
        length = rollout.text_length or self._loaded.spec.text_length
        guided = rollout.sampler == "unipc" and sampling.guidance_scale > 1
        if self._inputs.embeds:
            cond, uncond = read_embeds(self._inputs.embeds, length=length)
            self._embedded = {self._schedule.prompt: self._placed(cond)}
        else:
            prompts = {self._schedule.prompt, *(c.prompt for c in self._schedule.changes)}
            self._embedded = {text: self._embed(text, length) for text in sorted(prompts)}
            uncond = self._embed(sampling.negative_prompt, length) if guided else None
        self._uncond = self._placed(uncond) if guided and uncond is not None else None

    def of_chunk(self, span: Span) -> ChunkPrompt:
        """Prompts of a chunk. The same tensors while the wording lasts: their K/V is reused."""
        wording = self._schedule.at(span.index)
        key = (wording.old, wording.new, wording.share)
        if self._now is None or self._now[0] != key:
            old, new = self._embedded[wording.old], self._embedded[wording.new]
            cond = new if wording.share == 1 else torch.lerp(old, new, wording.share)
            self._now = (key, PromptPair(cond, self._uncond))
        return ChunkPrompt(self._now[1], recache=wording.changes and self._settings.rollout.recache)

    def _embed(self, text: str, length: int) -> Tensor:
        with torch.no_grad():
            embeddings: Tensor = self._loaded.pipeline.encode_prompt(
                text, do_classifier_free_guidance=False, max_sequence_length=length
            )[0]
        return embeddings

    def _placed(self, embeddings: Tensor) -> Tensor:
        return embeddings.to(self._loaded.device)


def read_given(given: InitialContext, loaded: Loaded, plan: RolloutPlan) -> Tensor:
    """Clean latents [1, C, F, H, W] to go on from. Raises InputError."""
    frames = plan.context[-1].end
    shape = (1, plan.shape.channels, frames, plan.shape.height, plan.shape.width)
    stride = loaded.spec.strides.spatial
    size = (plan.shape.width * stride, plan.shape.height * stride)
    if given.latents:
        latents = read_tensors(given.latents, "latents")["latents"]
        latents = latents.transpose(0, 1)[None].float()
    elif given.image:
        image = read_image(given.image, size=size)
        latents = encode_image(loaded.pipeline.vae, image, latent_frames=frames)
    elif given.clip:
        latents = encode_video(loaded.pipeline.vae, read_frames(given.clip))
    else:
        raise ValueError("nothing is given")
    if tuple(latents.shape) != shape:
        raise InputError(
            f"{given.latents or given.clip}: latents {[*latents.shape]} are not {[*shape]}.",
            hint="set --size as it was when they were made",
        )
    return latents


def read_noise(path: Path) -> tuple[Tensor, Tensor | None]:
    """`noise` [F, C, H, W], and `renoise` [N, C, H, W] where it is there. Raises InputError."""
    tensors = read_tensors(path, "noise")
    return tensors["noise"], tensors.get("renoise")


def read_embeds(path: Path, *, length: int) -> tuple[Tensor, Tensor | None]:
    """`prompt_embeds` and maybe `negative_embeds`, each [1, length, D], padded with zeros."""
    tensors = read_tensors(path, "prompt_embeds")

    def padded(name: str) -> Tensor | None:
        if name not in tensors:
            return None
        rows = tensors[name].float().flatten(0, -2)  # [L, D] or [1, L, D]
        return pad(rows, (0, 0, 0, length - len(rows)))[None]

    cond = padded("prompt_embeds")
    assert cond is not None  # noqa: S101 - read_tensors insisted on it
    return cond, padded("negative_embeds")


def read_tensors(path: Path, needed: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file that must hold `needed`. Raises InputError."""
    header_of(path, needed)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error, hint=f"give one that holds {needed}") from None
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():
            raise InputError(f"{path}: {name} is not finite.", hint="make it again")
    return tensors
