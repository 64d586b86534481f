"""Inputs of a rollout: prompts, initial context, and tensors for research."""

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
from wancli.planning.context import ContextFiles
from wancli.planning.plan import RolloutPlan
from wancli.planning.prompts import PromptSchedule
from wancli.records.tensor_files import header_of
from wancli.rollouts.denoiser import PromptPair
from wancli.rollouts.loop import ChunkPrompt
from wancli.utils.reading import unreadable
from wancli.video.images import read_image
from wancli.video.read import read_frames


class PromptEncoder:
    """Embeddings of a schedule's prompts, blended for each chunk."""

    def __init__(
        self, loaded: Loaded, settings: RolloutSettings, schedule: PromptSchedule, *,
        guided: bool, embeds: Path | None = None,
    ) -> None:  # fmt: skip
        """`embeds` is a file that replaces the prompts."""
        self._loaded, self._settings, self._schedule = loaded, settings, schedule
        self._guided, self._embeds = guided, embeds
        self._embeddings: dict[str, Tensor] = {}
        self._uncond: Tensor | None = None
        self._current: tuple[tuple[str, str, float], PromptPair] | None = None

    def encode(self) -> None:
        """Embed every prompt; call it before the first chunk."""
        length = self._settings.rollout.text_length or self._loaded.spec.text_length
        uncond: Tensor | None = None
        if self._embeds:
            cond, uncond = read_embeds(self._embeds, length=length)
            self._embeddings = {self._schedule.prompt: self._on_device(cond)}
        else:
            prompts = sorted(set(self._schedule.prompts))
            self._embeddings = {text: self._embed(text, length) for text in prompts}
            if self._guided:
                uncond = self._embed(self._settings.sampling.negative_prompt, length)
        self._uncond = self._on_device(uncond) if self._guided and uncond is not None else None

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


def read_context(files: ContextFiles, loaded: Loaded, plan: RolloutPlan) -> Tensor:
    """Clean latents [1, C, F, H, W] to continue from, as checked in the plan. Raises InputError."""
    if files.initial_latents:
        latents = read_tensors(files.initial_latents, "latents")["latents"]
        return latents.transpose(0, 1)[None].float()
    if files.extend:
        return encode_video(loaded.pipeline.vae, read_frames(files.extend))
    if files.image:
        stride = loaded.spec.strides.spatial
        size = (plan.shape.width * stride, plan.shape.height * stride)
        image = read_image(files.image, size=size)
        return encode_image(loaded.pipeline.vae, image, latent_frames=plan.start_frames)
    raise ValueError("there is no initial context")


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
