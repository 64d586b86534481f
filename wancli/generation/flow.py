"""Flow matching as in Wan: sigma goes from 1 (noise) to 0 (clean), velocity = noise - clean."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TRAIN_STEPS = 1000

Velocity = Callable[[Tensor, float], Tensor]  # noisy latents [B, C, F, H, W], timestep


@dataclass(frozen=True)
class Level:
    """A noise level: the timestep that the model gets, and the fraction of noise."""

    timestep: float
    sigma: float


def shifted_sigma(steps: float, shift: float) -> float:
    """The sigma after so many of the 1000 training steps from 1, shifted towards noise."""
    sigma = 1 - steps / TRAIN_STEPS
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigma_table(shift: float) -> list[float]:
    """The 1000 training sigmas, descending from 1, shifted towards noise by `shift`."""
    return [shifted_sigma(steps, shift) for steps in range(TRAIN_STEPS)]


def few_step_levels(timesteps: Sequence[float], *, shift: float, warp: bool) -> tuple[Level, ...]:
    """Noise levels of a distilled model's steps (Self-Forcing, arXiv:2506.08009).

    With `warp`, timesteps are shifted as sigmas are: 750 becomes 937.5 at shift 5. Without, each
    has the nearest sigma of training. No sigma is below the lowest of training. Timesteps stay
    floats: rounding them would change the steps.
    """
    if warp:
        sigmas = [shifted_sigma(TRAIN_STEPS - timestep, shift) for timestep in timesteps]
        lowest = shifted_sigma(TRAIN_STEPS - 1, shift)
        return tuple(Level(1000 * sigma, max(sigma, lowest)) for sigma in sigmas)
    table = sigma_table(shift)
    nearest = [min(table, key=lambda sigma: abs(1000 * sigma - t)) for t in timesteps]
    return tuple(Level(float(t), sigma) for t, sigma in zip(timesteps, nearest, strict=True))


def to_clean(noisy: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """Clean (x0) prediction, noisy - sigma * velocity, in float64 as in Self-Forcing."""
    exact = torch.float32 if noisy.device.type == "mps" else torch.float64  # which MPS lacks
    return (noisy.to(exact) - sigma * velocity.to(exact)).to(noisy.dtype)


def add_noise(clean: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """Noisy latents, (1 - sigma) * clean + sigma * noise."""
    return (1 - sigma) * clean + sigma * noise


@dataclass(frozen=True)
class Denoised:
    """Result of a denoising step: latents [B, C, F, H, W], clean after the last one."""

    index: int
    sigma: float
    latents: Tensor


def few_step(
    velocity: Velocity, noise: Callable[[int], Tensor], levels: Sequence[Level]
) -> Iterator[Denoised]:
    """Predict the clean latents and renoise them, step by step, with `noise(step)`.

    They begin with as much noise as the first level has, and nothing else.
    """
    latents = levels[0].sigma * noise(0)
    for index, level in enumerate(levels):
        latents = to_clean(latents, velocity(latents, level.timestep), level.sigma)
        if index + 1 < len(levels):
            latents = add_noise(latents, noise(index + 1), levels[index + 1].sigma)
        yield Denoised(index, level.sigma, latents)


def many_step_sigmas(steps: int) -> NDArray[np.float64]:
    """Unshifted sigmas of a rollout's solver, as in Self-Forcing's guided pipeline.

    They descend from 0.999 towards 0, diffusers' own from 1 to 0.001. Timesteps are these times
    1000, truncated to integers: hence the float32 0.999 of the original.
    """
    noisiest = float(np.float32(1 - 1 / TRAIN_STEPS))
    return np.linspace(noisiest, 0, steps + 1)[:-1]


def solve(velocity: Velocity, noise: Tensor, scheduler: Any) -> Iterator[Denoised]:
    """Denoise with a fresh diffusers scheduler whose timesteps are set."""
    latents = noise
    for index, timestep in enumerate(scheduler.timesteps.tolist()):
        sigma = float(scheduler.sigmas[index])
        step = scheduler.timesteps[index]
        output = velocity(latents, timestep)
        latents = scheduler.step(output, step, latents, return_dict=False)[0]
        yield Denoised(index, sigma, latents)


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv:2207.12598)."""
    return uncond + scale * (cond - uncond)
