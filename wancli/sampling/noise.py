"""Where a rollout's noise is from. Step 0 of a chunk is what it starts from.

All of it is drawn on the CPU in float32, so that a seed means the same on every device.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from wancli.geometry import Span


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
    are that stream ([F, C, H, W], [N, C, H, W]) instead of a seed's.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        shape: tuple[int, int, int],
        *,
        seed: int = 0,
        start: Tensor | None = None,
        again: Tensor | None = None,
    ) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._shape, self._again, self._used = shape, again, 0
        self._first = spans[0].first_frame
        frames = sum(span.frames for span in spans)
        self._start = self._draw(frames) if start is None else start

    def __call__(self, span: Span, step: int) -> Tensor:
        """[1, C, frames, H, W]."""
        if step == 0:
            first = span.first_frame - self._first
            frames = self._start[first : first + span.frames]
        elif self._again is None:
            frames = self._draw(span.frames)
        else:
            frames = self._again[self._used : self._used + span.frames]
            self._used += span.frames
        return frames.transpose(0, 1)[None].float()

    def _draw(self, frames: int) -> Tensor:
        return torch.randn(frames, *self._shape, generator=self._generator)
