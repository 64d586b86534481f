"""A rollout's settings as the model that remembers and the sampler of one chunk."""

from collections.abc import Iterator
from contextlib import AbstractContextManager

from torch import Tensor

from wancli.errors import ModelError
from wancli.geometry import Span
from wancli.models.denoiser import CausalDenoiser, Window, causal
from wancli.models.load import Loaded
from wancli.pipeline.generate import make_scheduler
from wancli.plan import RolloutPlan, steps_of, timesteps
from wancli.sampling.flow import TRAIN_STEPS, Denoised, Velocity, few_step, few_step_levels, solve
from wancli.sampling.noise import Noise
from wancli.settings import RolloutSettings


def remembering_model(
    loaded: Loaded, settings: RolloutSettings, plan: RolloutPlan
) -> AbstractContextManager[CausalDenoiser]:
    """The transformer with its memory; as it was, once left."""
    trim = settings.rollout.trim
    window = Window(plan.window, plan.sink, plan.chunk, plan.shape.tokens_per_frame, trim)
    pipeline, sampling = loaded.pipeline, settings.sampling
    high = sampling.guidance_scale if plan.guided else 1.0
    low = sampling.guidance_scale_2 if plan.guided else None
    if pipeline.transformer_2 is None:
        return causal(pipeline.transformer, window, rope=plan.rope, guidance_scale=high)
    boundary = sampling.boundary_ratio or pipeline.config.boundary_ratio
    if boundary is None:
        raise ModelError(
            f"{loaded.spec.name} does not say where its second expert takes over.",
            hint="--boundary-ratio 0.875",
        )
    return causal(
        (pipeline.transformer, pipeline.transformer_2),
        window,
        rope=plan.rope,
        guidance_scale=(high, high if low is None else low),
        boundary=TRAIN_STEPS * boundary,
    )


def denoise_chunk(
    loaded: Loaded, settings: RolloutSettings, noise: Noise, span: Span, velocity: Velocity
) -> Iterator[Denoised]:
    """Every step of one chunk, with a solver of its own."""

    def drawn(step: int) -> Tensor:
        return noise(span, step).to(loaded.device)

    sampling, chosen = settings.sampling, settings.rollout
    if chosen.sampler == "unipc":
        scheduler = make_scheduler(loaded.pipeline.scheduler.config, sampling)
        return solve(velocity, drawn(0), scheduler, steps=sampling.steps)
    listed = timesteps(steps_of(chosen, span))
    levels = few_step_levels(listed, shift=sampling.flow_shift, warp=chosen.warp_steps)
    return few_step(velocity, drawn, levels)
