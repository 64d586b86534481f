"""Autoregressive rollout: denoise a chunk, commit it to the KV cache clean, go on to the next.

Self-Forcing (arXiv:2506.08009); with many-step guided sampling, the same loop around a solver.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from wancli.catalog.geometry import Span
from wancli.generation.flow import Denoised, Velocity
from wancli.rollouts.denoiser import PromptPair


class Denoiser(Protocol):
    """A causal model with a KV cache of the chunks so far."""

    def set_prompt(self, prompts: PromptPair) -> None:
        """Condition on these prompts from now on."""

    def begin(self, span: Span) -> None:
        """Make room for a chunk."""

    def velocity(self, latents: Tensor, timestep: float) -> Tensor:
        """Velocity of one noisy chunk [1, C, F, H, W], conditioned on the chunks before it."""

    def commit(self, clean: Tensor, timestep: float) -> None:
        """Run the clean pass, whose keys and values stay in the cache."""

    def recache(self) -> None:
        """Recompute the KV cache of the chunks so far under the current prompt."""


@dataclass(frozen=True)
class ChunkPrompt:
    """Prompts of a chunk; with `recache`, the cached chunks are recomputed under them first."""

    prompts: PromptPair
    recache: bool = False


@dataclass(frozen=True)
class StepDone:
    """A finished denoising step of a chunk."""

    span: Span
    denoised: Denoised


@dataclass(frozen=True)
class Chunk:
    """Clean latents of one chunk. `KVCommitted` follows after its clean pass."""

    span: Span
    latents: Tensor  # [1, C, frames, H, W]
    generated: bool  # False: context, or loaded from an earlier run


@dataclass(frozen=True)
class KVCommitted:
    """A chunk's clean pass has finished."""

    span: Span


Event = StepDone | Chunk | KVCommitted


@dataclass(frozen=True)
class RolloutInputs:
    """Inputs of the loop, apart from the model."""

    context: Sequence[tuple[Span, Tensor]]  # initial chunks: an image, or a clip to extend
    spans: Sequence[Span]  # chunks to generate
    prompts: Callable[[Span], ChunkPrompt]
    finished: Callable[[Span], Tensor | None]  # latents of a chunk from an earlier run
    denoise: Callable[[Span, Velocity], Iterator[Denoised]]
    start: Tensor | None = None  # clean latents that the first chunk begins with
    context_timestep: float = 0.0  # of the clean passes of generated chunks


def rollout(model: Denoiser, inputs: RolloutInputs) -> Iterator[Event]:
    """Yield every finished step, clean chunk and clean pass.

    A chunk of k steps costs k + 1 forwards per branch; the last chunk needs no clean pass.
    Finished chunks are not denoised again: their clean passes alone rebuild the KV cache exactly.
    """
    for span, latents in inputs.context:
        model.set_prompt(inputs.prompts(span).prompts)
        model.begin(span)
        yield Chunk(span, latents, generated=False)
        model.commit(latents, 0.0)
        yield KVCommitted(span)
    for span in inputs.spans:
        prompt = inputs.prompts(span)
        model.set_prompt(prompt.prompts)
        if prompt.recache:
            model.recache()
        finished = inputs.finished(span)
        model.begin(span)
        if finished is None:
            for step in _denoise(model, inputs, span):
                yield StepDone(span, step)
            latents = step.latents
        else:
            latents = finished
        yield Chunk(span, latents, generated=finished is None)
        if span is not inputs.spans[-1]:
            model.commit(latents, inputs.context_timestep)
            yield KVCommitted(span)


def _denoise(model: Denoiser, inputs: RolloutInputs, span: Span) -> Iterator[Denoised]:
    """Denoise a chunk step by step; those that are clean from the start stay so."""
    if inputs.start is None or not span.clean_frames:
        yield from inputs.denoise(span, model.velocity)
        return
    start = inputs.start

    def begun(latents: Tensor) -> Tensor:
        return torch.cat([start.to(latents), latents[:, :, span.clean_frames :]], 2)

    def velocity(latents: Tensor, timestep: float) -> Tensor:
        return model.velocity(begun(latents), timestep)

    for step in inputs.denoise(span, velocity):
        yield replace(step, latents=begun(step.latents))
