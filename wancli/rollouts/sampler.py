"""The causal denoiser and the sampler of one chunk, from a rollout's settings."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from wancli.catalog.geometry import Span
from wancli.config.settings import RolloutSettings, Sampling
from wancli.errors import ModelError
from wancli.generation.caches import boundary_ratio, split_steps, step_caches
from wancli.generation.flow import (
    TRAIN_STEPS,
    Denoised,
    Velocity,
    few_step,
    few_step_levels,
    many_step_sigmas,
    solve,
)
from wancli.generation.noise import Noise
from wancli.generation.schedulers import ListedScheduler, make_scheduler
from wancli.models.attention import choose_kernel
from wancli.models.load import Loaded, transformers_of
from wancli.models.streams import to_device
from wancli.planning.plan import RolloutPlan, chunk_steps
from wancli.records.record import ForwardStats
from wancli.rollouts.denoiser import CausalDenoiser, causal


def causal_denoiser(
    loaded: Loaded, settings: RolloutSettings, plan: RolloutPlan
) -> AbstractContextManager[CausalDenoiser]:
    """The model's transformers as a causal denoiser. Raises ModelError, SetupError."""
    pipeline, sampling = loaded.pipeline, settings.sampling
    high = sampling.guidance_scale if plan.guided else 1.0
    low = sampling.guidance_scale_2 if plan.guided else None
    kernel = choose_kernel(
        transformers_of(pipeline), settings.machine, loaded.device,
        tokens=plan.window.chunk * plan.window.tokens_per_frame,
    )  # fmt: skip
    if pipeline.transformer_2 is None:
        return causal(
            pipeline.transformer, plan.window, rope=plan.rope, guidance_scale=high, kernel=kernel
        )
    boundary = boundary_ratio(pipeline, sampling)
    if boundary is None:
        raise ModelError(
            f"{loaded.spec.name} does not specify where its second expert takes over.",
            hint="`boundary_ratio 0.875`",
        )
    return causal(
        (pipeline.transformer, pipeline.transformer_2),
        plan.window,
        rope=plan.rope,
        guidance_scale=(high, high if low is None else low),
        boundary=TRAIN_STEPS * boundary,
        kernel=kernel,
    )


@dataclass
class ChunkSampler:
    """Denoises chunk after chunk, each with a fresh solver.

    A step cache spans the steps of one chunk. Clean passes are always computed in full, so that
    later chunks attend to exact keys and values.
    """

    loaded: Loaded
    settings: RolloutSettings
    plan: RolloutPlan
    noise: Noise
    stats: list[ForwardStats] = field(default_factory=list)  # of the last chunk, if it may reuse

    def __call__(self, span: Span, velocity: Velocity) -> Iterator[Denoised]:
        """Denoise one chunk, step by step."""

        def noise(step: int) -> Tensor:
            return to_device(self.noise(span, step), self.loaded.device)

        sampling, steps = self.settings.sampling, chunk_steps(self.settings, span)
        levels = few_step_levels(steps, shift=sampling.flow_shift, warp=sampling.warp_steps)
        if sampling.scheduler == "few-step":
            yield from few_step(velocity, noise, levels)
        elif levels:
            yield from solve(velocity, levels[0].sigma * noise(0), ListedScheduler(levels))
        else:
            yield from self._solve(noise(0), velocity)

    def _solve(self, noise: Tensor, velocity: Velocity) -> Iterator[Denoised]:
        pipeline, sampling = self.loaded.pipeline, self.settings.sampling
        scheduler = make_solver(pipeline.scheduler.config, sampling, device=noise.device)
        boundary = boundary_ratio(pipeline, sampling)
        split = split_steps(pipeline, scheduler.timesteps.tolist(), boundary)
        settings, model = self.settings.step_cache, self.loaded.spec.name
        with step_caches(split, settings, model, guided=self.plan.guided) as sessions:
            yield from solve(velocity, noise, scheduler)
        self.stats = [stats for session in sessions for stats in session.stats()]


def make_solver(config: Any, sampling: Sampling, *, device: torch.device) -> Any:
    """A fresh solver of any kind with the sigmas of Self-Forcing's UniPC."""
    scheduler = make_scheduler(config, sampling)
    if isinstance(scheduler, DPMSolverMultistepScheduler):  # accepts no sigmas; its own are equal
        scheduler.set_timesteps(sampling.steps, device=device)
    else:
        scheduler.set_timesteps(sigmas=many_step_sigmas(sampling.steps), device=device)
    return scheduler
