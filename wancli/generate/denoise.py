"""A video through diffusers' own pipelines: encode, denoise, decode."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wancli.catalog.tasks import TASKS, Task
from wancli.config.settings import Settings
from wancli.errors import RunError
from wancli.generate.caches import caches
from wancli.generate.prompts import Prompt
from wancli.models.load import Loaded
from wancli.models.vae import denormalize, require_finite, to_pixels
from wancli.planning.plan import Plan
from wancli.records.record import ForwardStats
from wancli.sampling.schedulers import make_scheduler


@dataclass(frozen=True)
class DenoisedClip:
    """Latents [1, C, F, H, W] in float32, normalised, and what every forward computed of them.

    Of several segments the latents are of the last. Where the pipeline has decoded them already
    there are `frames` uint8 [T, H, W, 3].
    """

    latents: Tensor
    uses: list[ForwardStats]
    prompt_kv_bytes: int  # that are kept for the prompt
    freed_bytes: int  # of weights that were off the device meanwhile
    frames: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class StepResult:
    """A denoising step, done: from `sigma` to `after`, which gave `latents` [1, C, F, H, W]."""

    index: int
    sigma: float
    after: float
    latents: Tensor


def denoise(
    loaded: Loaded,
    prompt: Prompt,
    settings: Settings,
    plan: Plan,
    *,
    seed: int,
    on_step: Callable[[StepResult], None],
) -> DenoisedClip:
    """Denoise with the caches of the settings; `on_step` hears of each step.

    Noise is drawn on the CPU, so that a seed means the same on every device.
    Raises RunError when the latents, or what a pipeline decodes of them, are not finite.
    """
    sampling, task, pipeline = settings.sampling, TASKS[plan.task], loaded.pipeline
    pipeline.scheduler = make_scheduler(pipeline.scheduler.config, sampling)
    pipeline.scheduler.set_timesteps(sampling.steps)
    left_out = sampling.steps - plan.steps // plan.segments
    timesteps = pipeline.scheduler.timesteps[left_out:].tolist() * plan.segments
    made = count()
    last: dict[str, Tensor] = {}

    def after_step(
        _pipeline: Any, index: int, _timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        first = left_out + index
        sigma, after = pipeline.scheduler.sigmas[first : first + 2].tolist()
        on_step(StepResult(next(made), sigma, after, tensors["latents"][:, :, plan.references :]))
        last.update(tensors)
        return tensors

    with (
        _boundary(pipeline, sampling.boundary_ratio),
        require_finite(pipeline.vae),  # some pipelines decode by themselves
        caches(loaded, prompt.memory, settings, plan, timesteps) as cached,
    ):
        given: Tensor = pipeline(
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            width=settings.video.width,
            height=settings.video.height,
            generator=torch.Generator().manual_seed(seed),
            max_sequence_length=loaded.spec.text_length,
            output_type="pt" if task.segmented else "latent",
            callback_on_step_end=after_step,
            **_settings(task, settings, plan),
            **prompt.embeddings,
            **prompt.pictures,
        ).frames
        freed = cached.freed_bytes
    latents = last["latents"] if task.segmented else given
    latents = latents[:, :, plan.references :]
    if not torch.isfinite(latents).all():
        raise RunError(
            "the latents are not finite: the denoising went wrong.",
            hint="--dtype float32, or a lower --guidance-scale",
        )
    frames = _levels(given) if task.segmented else None
    return DenoisedClip(latents, cached.uses(), prompt.memory.nbytes, freed, frames)


def _levels(video: Tensor) -> NDArray[np.uint8]:
    """A pipeline's own [1, T, 3, H, W] in [0, 1] as uint8 [T, H, W, 3]."""
    levels: NDArray[np.uint8] = (video[0].float() * 255).round().to(torch.uint8).cpu().numpy()
    return levels.transpose(0, 2, 3, 1)


def _settings(task: Task, settings: Settings, plan: Plan) -> dict[str, Any]:
    """The settings that only some pipelines have, by the pipeline's own names."""
    told = {**settings.sampling.model_dump(), **settings.video.model_dump()}
    told["segment_frames"] = plan.segment_frames
    return {theirs: told[ours] for ours, theirs in task.settings.items()}


@contextmanager
def _boundary(pipeline: Any, ratio: float | None) -> Iterator[None]:
    """Let another expert take over at `ratio` for one video; None leaves it to the model."""
    if ratio is None:
        yield
        return
    before = pipeline.config.boundary_ratio
    pipeline.register_to_config(boundary_ratio=ratio)
    try:
        yield
    finally:
        pipeline.register_to_config(boundary_ratio=before)


def decoded(loaded: Loaded, denoised: DenoisedClip) -> NDArray[np.uint8]:
    """Its video frames uint8 [T, H, W, 3], decoded now unless the pipeline has done so."""
    if denoised.frames is not None:
        return denoised.frames
    return decode(loaded.pipeline.vae, denoised.latents)


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> NDArray[np.uint8]:
    """Latents [1, C, F, H, W], normalised, to video frames uint8 [T, H, W, 3]. Raises RunError."""
    with require_finite(vae):
        video = vae.decode(denormalize(vae, latents), return_dict=False)[0]
    frames: NDArray[np.uint8] = to_pixels(video)[0].numpy()
    return frames
