"""Noise of rollouts. Step 0 of a chunk is its initial noise.

Drawn on the CPU in float32, so that a seed gives the same noise on every device.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from wancli.catalog.geometry import Span


class Noise(Protocol):
    """Noise source of a rollout."""

    def __call__(self, span: Span, step: int) -> Tensor:
        """Noise [1, C, frames, H, W] of one step. Call it in order of chunks and steps."""
        ...


class IndexedNoise:
    """A separate generator for every (seed, chunk, step): any length, any chunk reproducible.

    `seeds` maps the first chunk of a seed to the seed: re-rendered chunks have another one.
    """

    def __init__(self, seeds: Mapping[int, int], shape: tuple[int, int, int]) -> None:
        """`shape` is (C, H, W)."""
        self.seeds, self.shape = dict(seeds), shape

    def __call__(self, span: Span, step: int) -> Tensor:
        """Noise [1, C, frames, H, W], in any order of calls."""
        seed = self.seeds[max(chunk for chunk in self.seeds if chunk <= span.index)]
        digest = hashlib.sha256(f"{seed} {span.index} {step}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        channels, height, width = self.shape
        return torch.randn(1, channels, span.frames, height, width, generator=generator)


class StreamNoise:
    """Self-Forcing's order, from one stream: all initial noise first, then one draw per step.

    Each draw is [frames, C, H, W]; the length is fixed. `start` [F, C, H, W] and `renoise`
    [N, C, H, W] replace the seed's stream. Draws of finished chunks are skipped.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        draws: Sequence[int],
        shape: tuple[int, int, int],
        *,
        seed: int = 0,
        start: Tensor | None = None,
        renoise: Tensor | None = None,
    ) -> None:
        """`draws` is the number of draws per span, the initial one included. Raises ValueError."""
        self._generator = torch.Generator().manual_seed(seed)
        self._shape, self._renoise, self._used = shape, renoise, 0
        self._first = spans[0].first_frame
        later = [
            (span, step)
            for span, count in zip(spans, draws, strict=True)
            for step in range(1, count)
        ]
        self._remaining = iter(later)
        frames = sum(span.frames for span in spans)
        needed = sum(span.frames for span, _ in later)
        for name, stream, least in (("noise", start, frames), ("renoise", renoise, needed)):
            if stream is not None and (len(stream) < least or stream.shape[1:] != shape):
                raise ValueError(f"{name} {[*stream.shape]} is not [{least} or more, *{shape}]")
        self._start = self._draw(frames) if start is None else start

    def __call__(self, span: Span, step: int) -> Tensor:
        """Noise [1, C, frames, H, W]. Raises ValueError out of order."""
        if step == 0:
            first = span.first_frame - self._first
            return _by_channel(self._start[first : first + span.frames])
        for next_span, next_step in self._remaining:
            frames = self._next(next_span.frames)
            if (next_span, next_step) == (span, step):
                return _by_channel(frames)
        raise ValueError(f"step {step} of {span} is not in the stream, or past")

    def _next(self, frames: int) -> Tensor:
        if self._renoise is None:
            return self._draw(frames)
        self._used += frames
        return self._renoise[self._used - frames : self._used]

    def _draw(self, frames: int) -> Tensor:
        return torch.randn(frames, *self._shape, generator=self._generator)


def _by_channel(frames: Tensor) -> Tensor:
    """[F, C, H, W] to [1, C, F, H, W]."""
    return frames.transpose(0, 1)[None].float()
