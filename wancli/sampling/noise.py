"""Where a rollout's noise is from. Step 0 of a chunk is what it starts from.

All of it is drawn on the CPU in float32, so that a seed means the same on every device.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from wancli.catalog.geometry import Span


class Noise(Protocol):
    """Noise for one chunk and step, [1, C, frames, H, W]."""

    def __call__(self, span: Span, step: int) -> Tensor:
        """Steps are asked for in order, chunk after chunk."""
        ...


class IndexedNoise:
    """A generator of its own for every (seed, chunk, step): no length limit, and any chunk again.

    `seeds` says from which chunk on a seed holds: a chunk made again has another.
    """

    def __init__(self, seeds: Mapping[int, int], shape: tuple[int, int, int]) -> None:
        """`shape` is (C, H, W)."""
        self.seeds, self.shape = dict(seeds), shape

    def __call__(self, span: Span, step: int) -> Tensor:
        """[1, C, frames, H, W]."""
        seed = self.seeds[max(chunk for chunk in self.seeds if chunk <= span.index)]
        digest = hashlib.sha256(f"{seed} {span.index} {step}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        channels, height, width = self.shape
        return torch.randn(1, channels, span.frames, height, width, generator=generator)


class StreamNoise:
    """The original's order, from one stream: all the starts first, then a draw a chunk and step.

    Frame-major, [frames, C, H, W] a draw; of bounded length. `start` and `again`, where given,
    are that stream ([F, C, H, W], [N, C, H, W]) instead of a seed's. Draws that nobody asks for,
    of chunks that are known, are passed over.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        draws: Sequence[int],
        shape: tuple[int, int, int],
        *,
        seed: int = 0,
        start: Tensor | None = None,
        again: Tensor | None = None,
    ) -> None:
        """`draws` counts those of each span, its start too; ValueError where a stream is short."""
        self._generator = torch.Generator().manual_seed(seed)
        self._shape, self._again, self._used = shape, again, 0
        self._first = spans[0].first_frame
        later = [
            (span, step)
            for span, count in zip(spans, draws, strict=True)
            for step in range(1, count)
        ]
        self._left = iter(later)
        frames = sum(span.frames for span in spans)
        needed = sum(span.frames for span, _ in later)
        for name, given, least in (("noise", start, frames), ("renoise", again, needed)):
            if given is not None and (len(given) < least or given.shape[1:] != shape):
                raise ValueError(f"{name} {[*given.shape]} is not [{least} or more, *{shape}]")
        self._start = self._draw(frames) if start is None else start

    def __call__(self, span: Span, step: int) -> Tensor:
        """[1, C, frames, H, W]."""
        if step == 0:
            first = span.first_frame - self._first
            return _by_channel(self._start[first : first + span.frames])
        for coming, number in self._left:
            frames = self._next(coming.frames)
            if (coming, number) == (span, step):
                return _by_channel(frames)
        raise ValueError(f"step {step} of {span} is not in the stream, or is past")

    def _next(self, frames: int) -> Tensor:
        if self._again is None:
            return self._draw(frames)
        self._used += frames
        return self._again[self._used - frames : self._used]

    def _draw(self, frames: int) -> Tensor:
        return torch.randn(frames, *self._shape, generator=self._generator)


def _by_channel(frames: Tensor) -> Tensor:
    """[F, C, H, W] to [1, C, F, H, W]."""
    return frames.transpose(0, 1)[None].float()
