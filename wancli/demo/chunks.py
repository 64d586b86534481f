"""Chunk after chunk: how the demo's causal use is sampled, without a cache.

Each chunk is denoised from noise beside the clean chunks made so far. It is what a rollout with a
K/V cache computes, at the price of computing the past again in every forward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from wancli.demo.causal import Layout, causal_velocity, slots
from wancli.demo.parts import CHUNK
from wancli.geometry import LatentShape
from wancli.pipeline.generate import Prompt

Velocity = Callable[[Tensor, float], Tensor]  # of noisy latents [B, C, CHUNK, H, W] at one sigma


@dataclass(frozen=True)
class Schedule:
    """How every chunk is denoised."""

    steps: int
    guidance_scale: float
    shift: float
    renoise: bool = False  # for few steps: to the clean prediction, then fresh noise

    def sigmas(self) -> list[float]:
        """From 1 to 0, one more than there are steps."""
        line = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)
        sigmas: list[float] = (self.shift * line / (1 + (self.shift - 1) * line)).tolist()
        return sigmas


@torch.no_grad()
def sample_chunks(
    transformer: WanTransformer3DModel,
    prompt: Prompt,
    schedule: Schedule,
    *,
    shape: LatentShape,
    seeds: Sequence[int],
) -> Tensor:
    """Latents [B, C, F, H, W] in float32, normalised: one clip a seed; `prompt` is [B, text, D].

    A clip depends on its own seed only, not on what else is in the batch.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def noise() -> Tensor:
        size = (shape.channels, CHUNK, shape.height, shape.width)
        drawn = torch.stack([torch.randn(size, generator=g) for g in generators])
        return drawn.to(prompt.positive.device)

    clean = torch.empty(len(seeds), shape.channels, 0, shape.height, shape.width)
    clean = clean.to(prompt.positive.device)
    for index in range(shape.frames // CHUNK):
        sequence = slots(clean=index, noisy=range(index, index + 1), chunk=CHUNK)
        velocity = guided(transformer, prompt, clean, schedule.guidance_scale)
        with Layout(sequence, tokens_per_frame=shape.tokens_per_frame).seen_by(transformer):
            chunk = denoise_chunk(velocity, noise, schedule)
        clean = torch.cat([clean, chunk], 2)
    return clean


def denoise_chunk(velocity: Velocity, noise: Callable[[], Tensor], schedule: Schedule) -> Tensor:
    """[B, C, CHUNK, H, W]: Euler steps, or steps to the clean prediction and back into noise."""
    x = noise()
    for sigma, following in pairwise(schedule.sigmas()):
        v = velocity(x, sigma)
        if schedule.renoise:
            x = (1 - following) * (x - sigma * v) + following * noise()
        else:
            x = x + (following - sigma) * v
    return x


def guided(
    transformer: WanTransformer3DModel, prompt: Prompt, clean: Tensor, guidance_scale: float
) -> Velocity:
    """Velocity of one noisy chunk after the `clean` ones [B, C, F, H, W], under guidance."""

    def velocity(noisy: Tensor, sigma: float) -> Tensor:
        sigmas = torch.full((len(noisy), noisy.shape[2]), sigma, device=noisy.device)
        past, now = clean.to(transformer.dtype), noisy.to(transformer.dtype)
        cond = causal_velocity(transformer, past, now, sigmas, prompt.positive).float()
        if prompt.negative is None:
            return cond
        uncond = causal_velocity(transformer, past, now, sigmas, prompt.negative).float()
        return uncond + guidance_scale * (cond - uncond)

    return velocity
