"""A rollout's settings as the model that remembers and the sampler of one chunk."""

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
from wancli.generate.caches import split_steps, step_caches
from wancli.models.load import Loaded
from wancli.planning.plan import RolloutPlan, chunk_steps, timesteps
from wancli.records.record import ForwardStats
from wancli.rollout.denoiser import CausalDenoiser, causal
from wancli.sampling.flow import (
    TRAIN_STEPS,
    Denoised,
    Velocity,
    few_step,
    few_step_levels,
    many_step_sigmas,
    solve,
)
from wancli.sampling.noise import Noise
from wancli.sampling.schedulers import make_scheduler


def causal_denoiser(
    loaded: Loaded, settings: RolloutSettings, plan: RolloutPlan
) -> AbstractContextManager[CausalDenoiser]:
    """The model's transformers as a causal denoiser. Raises ModelError."""
    pipeline, sampling = loaded.pipeline, settings.sampling
    high = sampling.guidance_scale if plan.guided else 1.0
    low = sampling.guidance_scale_2 if plan.guided else None
    if pipeline.transformer_2 is None:
        return causal(pipeline.transformer, plan.window, rope=plan.rope, guidance_scale=high)
    boundary = sampling.boundary_ratio or pipeline.config.boundary_ratio
    if boundary is None:
        raise ModelError(
            f"{loaded.spec.name} does not say where its second expert takes over.",
            hint="--boundary-ratio 0.875",
        )
    return causal(
        (pipeline.transformer, pipeline.transformer_2),
        plan.window,
        rope=plan.rope,
        guidance_scale=(high, high if low is None else low),
        boundary=TRAIN_STEPS * boundary,
    )


@dataclass
class ChunkSampler:
    """Denoises chunk after chunk, each with a solver of its own.

    A step cache is entered for the steps of one chunk: clean passes are always computed whole, so
    that what later chunks attend to is not what was left out.
    """

    loaded: Loaded
    settings: RolloutSettings
    plan: RolloutPlan
    noise: Noise
    uses: list[ForwardStats] = field(
        default_factory=list
    )  # of the last chunk, where anything is reused

    def __call__(self, span: Span, velocity: Velocity) -> Iterator[Denoised]:
        """Every step of one chunk."""

        def drawn(step: int) -> Tensor:
            return self.noise(span, step).to(self.loaded.device)

        sampling, chosen = self.settings.sampling, self.settings.rollout
        if chosen.sampler == "unipc":
            yield from self._solve(drawn(0), velocity)
            return
        listed = timesteps(chunk_steps(chosen, span))
        levels = few_step_levels(listed, shift=sampling.flow_shift, warp=chosen.warp_steps)
        yield from few_step(velocity, drawn, levels)

    def _solve(self, noise: Tensor, velocity: Velocity) -> Iterator[Denoised]:
        pipeline, sampling = self.loaded.pipeline, self.settings.sampling
        scheduler = make_solver(pipeline.scheduler.config, sampling, device=noise.device)
        split = split_steps(pipeline, scheduler.timesteps.tolist())
        chosen, model = self.settings.step_cache, self.loaded.spec.name
        with step_caches(split, chosen, model, guided=self.plan.guided) as sessions:
            yield from solve(velocity, noise, scheduler)
        self.uses = [use for session in sessions for use in session.uses()]


def make_solver(config: Any, sampling: Sampling, *, device: torch.device) -> Any:
    """A fresh solver, its timesteps set; whichever it is, by the sigmas of Self-Forcing's UniPC."""
    scheduler = make_scheduler(config, sampling)
    if isinstance(scheduler, DPMSolverMultistepScheduler):  # takes no sigmas: its own are the same
        scheduler.set_timesteps(sampling.steps, device=device)
    else:
        scheduler.set_timesteps(sigmas=many_step_sigmas(sampling.steps), device=device)
    return scheduler
