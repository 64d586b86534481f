"""Flow matching as Wan does it: sigmas from 1 (noise) to 0 (clean), velocity = noise - clean."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

TRAIN_STEPS = 1000

Velocity = Callable[[Tensor, float], Tensor]  # of noisy latents [B, C, F, H, W] at a timestep


@dataclass(frozen=True)
class Level:
    """How noisy latents are: what the model is told, and the share of noise."""

    timestep: float
    sigma: float


def sigma_table(shift: float) -> list[float]:
    """The 1000 sigmas of training, from 1 down, moved towards noise by `shift`."""
    line = [1 - i / TRAIN_STEPS for i in range(TRAIN_STEPS)]
    return [shift * s / (1 + (shift - 1) * s) for s in line]


def few_step_levels(timesteps: Sequence[int], *, shift: float, warp: bool) -> tuple[Level, ...]:
    """The levels of a distilled model's steps (Self-Forcing, arXiv:2506.08009).

    With `warp`, a listed timestep t means the t-th of the shifted table: 750 is 937.5 at shift 5.
    Timesteps stay floats: as integers they are other steps.
    """
    table = sigma_table(shift)
    warped = [*(1000 * sigma for sigma in table), 0.0]
    told = [warped[TRAIN_STEPS - t] if warp else float(t) for t in timesteps]
    return tuple(Level(t, min(table, key=lambda sigma: abs(1000 * sigma - t))) for t in told)


def to_clean(noisy: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """The clean prediction, noisy - sigma * velocity, in float64 as the original computes it."""
    return (noisy.double() - sigma * velocity.double()).to(noisy.dtype)


def add_noise(clean: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """(1 - sigma) * clean + sigma * noise."""
    return (1 - sigma) * clean + sigma * noise


@dataclass(frozen=True)
class Denoised:
    """One denoising step, done: latents [B, C, F, H, W], clean after the last."""

    index: int
    sigma: float
    latents: Tensor


def few_step(
    velocity: Velocity, noise: Callable[[int], Tensor], levels: Sequence[Level]
) -> Iterator[Denoised]:
    """To the clean prediction, and back into fresh noise: `noise(i)` is that of step i."""
    latents = noise(0)
    for index, (level, following) in enumerate(pairwise([*levels, None])):
        assert level is not None  # noqa: S101 - only the last of the pairs is None
        latents = to_clean(latents, velocity(latents, level.timestep), level.sigma)
        if following is not None:
            latents = add_noise(latents, noise(index + 1), following.sigma)
        yield Denoised(index, level.sigma, latents)


def many_step_sigmas(steps: int) -> NDArray[np.float64]:
    """Sigmas of a rollout's solver, before the shift, as Self-Forcing's guided pipeline has them.

    They begin at 0.999 and would end at 0, where diffusers' own go from 1 to 0.001. Timesteps are
    1000 times these, cut to integers: so 0.999 is the float32 that the original keeps.
    """
    noisiest = float(np.float32(1 - 1 / TRAIN_STEPS))
    return np.linspace(noisiest, 0, steps + 1)[:-1]


def solve(velocity: Velocity, noise: Tensor, scheduler: Any) -> Iterator[Denoised]:
    """The steps of one of diffusers' solvers, whose timesteps are set and of which none is made."""
    latents = noise
    for index, timestep in enumerate(scheduler.timesteps.tolist()):
        sigma = float(scheduler.sigmas[index])
        flow = velocity(latents, timestep)
        step = scheduler.timesteps[index]
        latents = scheduler.step(flow, step, latents, return_dict=False)[0]
        yield Denoised(index, sigma, latents)


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv:2207.12598)."""
    return uncond + scale * (cond - uncond)
