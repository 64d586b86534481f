"""Autoregressive rollout: denoise a chunk, remember it clean, go on to the next.

Self-Forcing (arXiv:2506.08009); with many-step guided sampling, the same loop around a solver.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from wancli.catalog.geometry import Span
from wancli.rollout.denoiser import PromptPair
from wancli.sampling.flow import Denoised, Velocity


class Denoiser(Protocol):
    """A causal model that remembers the chunks it has been shown."""

    def tell(self, prompts: PromptPair) -> None:
        """Prompts from now on."""

    def begin(self, span: Span) -> None:
        """Make room for a chunk."""

    def velocity(self, latents: Tensor, timestep: float) -> Tensor:
        """Of one noisy chunk [1, C, F, H, W], given the chunks before it."""

    def remember(self, clean: Tensor, timestep: float) -> None:
        """The clean pass."""

    def forget(self) -> None:
        """Remember no chunk at all."""


@dataclass(frozen=True)
class ChunkPrompt:
    """Prompts of a chunk; `again`: the remembered chunks are read again under them first."""

    prompts: PromptPair
    again: bool = False


@dataclass(frozen=True)
class StepDone:
    """One denoising step of a chunk, done."""

    span: Span
    denoised: Denoised


@dataclass(frozen=True)
class Chunk:
    """One chunk, clean. Its clean pass is still to come, and then `KVCommitted`."""

    span: Span
    latents: Tensor  # [1, C, frames, H, W]
    made: bool  # or else it was known before


@dataclass(frozen=True)
class KVCommitted:
    """The clean pass of a chunk, done."""

    span: Span


Event = StepDone | Chunk | KVCommitted


@dataclass(frozen=True)
class RolloutInputs:
    """What happens from chunk to chunk, apart from the model."""

    given: Sequence[tuple[Span, Tensor]]  # context: an image, or a clip to go on from
    spans: Sequence[Span]  # to be made
    tell: Callable[[Span], ChunkPrompt]
    known: Callable[[Span], Tensor | None]  # chunks that an earlier run made
    denoise: Callable[[Span, Velocity], Iterator[Denoised]]
    context_timestep: float = 0.0  # of the clean passes of chunks that were made


@dataclass
class ContextBuffer:
    """The clean chunks that are still in reach, to be read again under another prompt."""

    sink: int  # latent frames
    window: int  # latent frames, the current chunk included
    chunks: list[tuple[Span, Tensor, float]] = field(default_factory=list)

    def add(self, span: Span, latents: Tensor, timestep: float) -> None:
        """One more; those out of reach of the next chunk are dropped."""
        self.chunks.append((span, latents, timestep))
        reach = span.end - (self.window - self.sink)
        self.chunks = [
            (old, clean, at)
            for old, clean, at in self.chunks
            if old.first_frame < self.sink or old.end > reach
        ]


def rollout(model: Denoiser, story: RolloutInputs, past: ContextBuffer) -> Iterator[Event]:
    """Yield every step as it happens, every chunk as it is clean, every clean pass.

    A chunk of k steps costs k + 1 forwards a branch; after the last one nothing is remembered.
    What is known is not denoised again: the clean passes alone bring the memory back, bit by bit.
    """
    for span, latents in story.given:
        model.tell(story.tell(span).prompts)
        model.begin(span)
        yield Chunk(span, latents, made=False)
        model.remember(latents, 0.0)
        past.add(span, latents, 0.0)
        yield KVCommitted(span)
    for span in story.spans:
        told = story.tell(span)
        model.tell(told.prompts)
        if told.again:
            _read_again(model, past)
        known = story.known(span)
        model.begin(span)
        if known is None:
            for step in story.denoise(span, model.velocity):
                yield StepDone(span, step)
            latents = step.latents
        else:
            latents = known
        yield Chunk(span, latents, made=known is None)
        if span is not story.spans[-1]:
            model.remember(latents, story.context_timestep)
            past.add(span, latents, story.context_timestep)
            yield KVCommitted(span)


def _read_again(model: Denoiser, past: ContextBuffer) -> None:
    """So that the past no longer pulls towards the old prompt (LongLive, arXiv:2509.22622)."""
    model.forget()
    for span, latents, timestep in past.chunks:
        model.begin(span)
        model.remember(latents, timestep)
