"""Denoise and decode a video with diffusers' pipelines."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray
from torch import Tensor

from wancli.caching.self_attention import self_attention
from wancli.catalog.tasks import TASKS, VIDEO, Task
from wancli.config.settings import Settings
from wancli.errors import RunError
from wancli.generation.caches import caches
from wancli.generation.prompts import Prompt
from wancli.generation.schedulers import ListedScheduler, clip_scheduler
from wancli.models.attention import AttentionKernel, choose_kernel
from wancli.models.fast_decoder import latents_per_call
from wancli.models.load import Loaded, transformers_of
from wancli.models.offload import onload
from wancli.models.optimize import enough_graphs
from wancli.models.vae import (
    StreamingDecoder,
    decodes_in_parts,
    denormalize,
    require_finite,
    to_pixels,
)
from wancli.models.vae_scaling import latent_normalizer
from wancli.planning.listed_steps import step_count
from wancli.planning.plan import Plan
from wancli.records.progress import Decoded, Report, ignore
from wancli.records.record import ForwardStats

_HIGHEST = 1 - 1e-6  # a sigma that is 1 but for rounding


@dataclass(frozen=True)
class DenoisedClip:
    """Normalised latents [1, C, F, H, W] in float32, and the statistics of every forward.

    With several segments, the latents are those of the last one. `frames` uint8 [T, H, W, 3] are
    set if the pipeline decodes them itself.
    """

    latents: Tensor
    stats: list[ForwardStats]
    prompt_kv_bytes: int
    freed_bytes: int  # of weights off the device while denoising
    attention: str = ""  # the kernel that ran
    frames: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class StepResult:
    """A finished denoising step from `sigma` to `after`, with its `latents` [1, C, F, H, W].

    `clean` latents are set where the step predicted them and then added other noise.
    """

    index: int
    sigma: float
    after: float
    latents: Tensor
    clean: Tensor | None = None


def denoise(
    loaded: Loaded,
    prompt: Prompt,
    settings: Settings,
    plan: Plan,
    *,
    seed: int,
    on_step: Callable[[StepResult], None],
) -> DenoisedClip:
    """Denoise with the configured caches; `on_step` is called after each step.

    Noise is drawn on the CPU, so that a seed gives the same noise on every device. Raises RunError
    if the latents, or frames that the pipeline decodes, are not finite.
    """
    sampling, task, pipeline = settings.sampling, TASKS[plan.task], loaded.pipeline
    generator = torch.Generator().manual_seed(seed)
    scheduler = clip_scheduler(pipeline.scheduler.config, sampling, generator)
    skipped = step_count(sampling) - plan.steps // plan.segments
    timesteps = scheduler.timesteps[skipped:].tolist() * plan.segments
    last: dict[str, Tensor] = {}
    kernel = choose_kernel(
        transformers_of(pipeline), settings.machine, loaded.device, tokens=plan.tokens
    )
    with (
        _scheduler(pipeline, scheduler),
        _boundary(pipeline, sampling.boundary_ratio),
        require_finite(pipeline.vae),  # some pipelines decode themselves
        kernel.preferred(),
        enough_graphs(compiled=settings.machine.compile),
        _self_attention(pipeline, kernel),
        caches(loaded, prompt.memory, settings, plan, timesteps) as cached,
    ):
        output: Tensor = pipeline(
            generator=generator,
            num_inference_steps=step_count(sampling),
            max_sequence_length=loaded.spec.text_length,
            output_type="pt" if task.segmented else "latent",
            callback_on_step_end=_after_step(plan, on_step, last, skipped=skipped),
            **_arguments(task, settings, plan),
            **_initial_noise(plan, scheduler, generator),
            **prompt.embeddings,
            **prompt.pictures,
        ).frames
        freed = cached.freed_bytes
    latents = _of_video(last["latents"] if task.segmented else output, plan)
    frames = _levels(output) if task.segmented else None
    return DenoisedClip(latents, cached.stats(), prompt.memory.nbytes, freed, kernel.name, frames)


def _of_video(latents: Tensor, plan: Plan) -> Tensor:
    """The latents without those of reference pictures. Raises RunError if they are not finite."""
    latents = latents[:, :, plan.references :]
    if not torch.isfinite(latents).all():
        raise RunError(
            "the latents are not finite.",
            hint="`dtype float32`, or a lower `guidance_scale`",
        )
    return latents


def _after_step(
    plan: Plan, on_step: Callable[[StepResult], None], last: dict[str, Tensor], *, skipped: int
) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]:
    """A callback for diffusers' pipelines: reports each step, and keeps its tensors in `last`."""
    step_numbers = count()  # over all segments, each of which begins with index 0

    def after_step(
        pipeline: Any, index: int, _timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        first = skipped + index
        sigma, after = pipeline.scheduler.sigmas[first : first + 2].tolist()
        latents = tensors["latents"][:, :, plan.references :]
        clean = getattr(pipeline.scheduler, "clean", None)
        clean = None if clean is None else clean[:, :, plan.references :]
        on_step(StepResult(next(step_numbers), sigma, after, latents, clean))
        last.update(tensors)
        return tensors

    return after_step


def _levels(video: Tensor) -> NDArray[np.uint8]:
    """Video [1, T, 3, H, W] in [0, 1] of a pipeline to uint8 [T, H, W, 3]."""
    levels: NDArray[np.uint8] = (video[0].float() * 255).round().to(torch.uint8).cpu().numpy()
    return levels.transpose(0, 2, 3, 1)


def _arguments(task: Task, settings: Settings, plan: Plan) -> dict[str, Any]:
    """The settings as arguments of the pipeline; some only some pipelines have."""
    values = {**settings.sampling.model_dump(), **settings.video.model_dump()}
    values["segment_frames"] = plan.segment_frames
    if settings.sampling.scheduler == "few-step":
        values["guidance_scale"] = 1.0
    of_all = {name: values[name] for name in ("guidance_scale", "width", "height")}
    of_task = {argument: values[name] for name, argument in task.settings.items()}
    return {**of_all, **of_task}


def _initial_noise(plan: Plan, scheduler: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """The initial latents of a list that begins below the highest noise; else the pipeline's own.

    They are as much noise as the first level has, and nothing else. A video to transform has its
    own.
    """
    sigma = float(scheduler.sigmas[0])
    if not isinstance(scheduler, ListedScheduler) or sigma > _HIGHEST or plan.task == VIDEO:
        return {}
    shape, frames = plan.shape, plan.shape.frames + plan.references
    noise = torch.randn(
        1, shape.channels, frames, shape.height, shape.width, generator=generator
    )  # as the pipelines draw it
    return {"latents": sigma * noise}


@contextmanager
def _self_attention(pipeline: Any, kernel: AttentionKernel) -> Iterator[None]:
    """Attend with this kernel in the block; torch's own choice is left to diffusers."""
    with ExitStack() as stack:
        if kernel.backend != "native":
            for transformer in transformers_of(pipeline):
                stack.enter_context(self_attention(transformer, kernel.backend))
        yield


@contextmanager
def _scheduler(pipeline: Any, scheduler: Any) -> Iterator[None]:
    """Use a scheduler in the block; the model's own configures that of the next video."""
    before, pipeline.scheduler = pipeline.scheduler, scheduler
    try:
        yield
    finally:
        pipeline.scheduler = before


@contextmanager
def _boundary(pipeline: Any, ratio: float | None) -> Iterator[None]:
    """Switch experts at `ratio` in the block; None keeps the model's boundary."""
    if ratio is None:
        yield
        return
    before = pipeline.config.boundary_ratio
    pipeline.register_to_config(boundary_ratio=ratio)
    try:
        yield
    finally:
        pipeline.register_to_config(boundary_ratio=before)


def clip_frames(
    loaded: Loaded, denoised: DenoisedClip, report: Report = ignore
) -> NDArray[np.uint8]:
    """The video frames uint8 [T, H, W, 3], decoded now unless the pipeline has done so."""
    if denoised.frames is not None:
        return denoised.frames
    return decode(loaded.pipeline.vae, denoised.latents, report)


@torch.no_grad()
def decode(vae: Any, latents: Tensor, report: Report = ignore) -> NDArray[np.uint8]:
    """Normalised latents [1, C, F, H, W] to video frames uint8 [T, H, W, 3]. Raises DecodeError.

    Frames are reported as they are decoded, unless the decoder works in tiles.
    """
    done, total = 0, latent_normalizer(vae).temporal * (latents.shape[2] - 1) + 1

    def on_frames(count: int) -> None:
        nonlocal done
        done += count
        report(Decoded(done, total))

    if decodes_in_parts(vae):
        return _decode_in_parts(vae, latents, on_frames)
    in_tiles = vae.use_tiling or not isinstance(vae, AutoencoderKLWan)  # others': in time, too
    with require_finite(vae, None if in_tiles else on_frames):
        video = vae.decode(denormalize(vae, latents), return_dict=False)[0]
    frames: NDArray[np.uint8] = to_pixels(video)[0].numpy()
    return frames


def _decode_in_parts(
    vae: Any, latents: Tensor, on_frames: Callable[[int], None]
) -> NDArray[np.uint8]:
    """The same with as many latents per call as the decoder takes."""
    onload(vae)
    decoder, frames = StreamingDecoder(vae), []
    for part in torch.split(latents, latents_per_call(vae), 2):
        frames.append(decoder(part))
        on_frames(len(frames[-1]))
    return np.concatenate(frames)
