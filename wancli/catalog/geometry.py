"""Sizes of a video in pixels, latents and tokens. Arithmetic only."""

from dataclasses import dataclass, replace
from itertools import accumulate, product
from math import ceil, floor
from typing import Literal

from wancli.errors import PlanError

TILE, STRIDE = 256, 192  # pixels: size and stride of diffusers' VAE tiles


@dataclass(frozen=True)
class Strides:
    """Compression factors: pixels and video frames per latent, latents per token."""

    temporal: int = 4  # video frames per latent frame, after the first
    spatial: int = 8  # pixels per latent, each way
    patch: int = 2  # latents per token, each way

    @property
    def cell(self) -> int:
        """Pixels per token, each way."""
        return self.spatial * self.patch


@dataclass(frozen=True)
class LatentShape:
    """Latents of one video, [channels, frames, height, width]."""

    channels: int
    frames: int
    height: int
    width: int
    tokens_per_frame: int

    @property
    def tokens(self) -> int:
        """Sequence length in the transformer."""
        return self.frames * self.tokens_per_frame


def latent_shape(
    *, num_frames: int, width: int, height: int, channels: int, strides: Strides
) -> LatentShape:
    """Latent shape of `num_frames` video frames of `width` x `height` pixels.

    Raises PlanError if the strides do not divide them: nothing is rounded silently.
    """
    if (num_frames - 1) % strides.temporal:
        below = (num_frames - 1) // strides.temporal * strides.temporal + 1
        raise PlanError(
            f"`num_frames {num_frames}` is not {strides.temporal}k+1.",
            hint=f"use {below} or {below + strides.temporal}",
        )
    for name, value in (("width", width), ("height", height)):
        if value % strides.cell:
            near = [_nearest(side, strides.cell) for side in (width, height)]
            raise PlanError(
                f"`size {width}x{height}`: {name} must be a multiple of {strides.cell}.",
                hint=f"`size {near[0]}x{near[1]}`",
            )
    return LatentShape(
        channels=channels,
        frames=(num_frames - 1) // strides.temporal + 1,
        height=height // strides.spatial,
        width=width // strides.spatial,
        tokens_per_frame=(height // strides.cell) * (width // strides.cell),
    )


def cut_off(shape: tuple[int, int], size: tuple[int, int]) -> float:
    """Fraction of a picture of `shape` that is cut off to fit `size`, both (width, height)."""
    ratio = shape[0] * size[1] / (shape[1] * size[0])
    return 1 - min(ratio, 1 / ratio)


def size_like(shape: tuple[int, int], size: tuple[int, int], strides: Strides) -> tuple[int, int]:
    """Size about the area of `size`, in whole tokens, that cuts least off a picture of `shape`.

    All are (width, height) in pixels.
    """
    wider = (shape[0] * size[1] / (shape[1] * size[0])) ** 0.5
    width, height = (side / strides.cell for side in (size[0] * wider, size[1] / wider))
    around = product(*({max(1, floor(side)), ceil(side)} for side in (width, height)))
    sizes = [(across * strides.cell, down * strides.cell) for across, down in sorted(around)]
    return min(sizes, key=lambda near: cut_off(shape, near))


@dataclass(frozen=True)
class Span:
    """Latent frames of one chunk; `index` is negative in the initial context."""

    index: int
    first_frame: int
    frames: int
    clean_frames: int = 0  # its first ones that are clean from the start: those of a picture
    offset: int = 0  # of its positions, which jump at the beginning of a shot
    begins_shot: bool = False  # and its first frames stay in the window, as the sink does

    @property
    def end(self) -> int:
        """The latent frame after the last."""
        return self.first_frame + self.frames

    def video_frames(self, strides: Strides) -> int:
        """Video frames it decodes to: the video's first latent frame is a single one."""
        return self.frames * strides.temporal - (0 if self.first_frame else strides.temporal - 1)


Trim = Literal["before", "after"]
RecacheBy = Literal["chunk", "window"]


@dataclass(frozen=True)
class WindowConfig:
    """The attention window of a rollout, in latent frames. The current chunk counts towards it."""

    window: int
    sink: int  # first frames, never evicted
    chunk: int  # the most frames of one chunk
    tokens_per_frame: int
    trim: Trim = "before"
    recache_by: RecacheBy = "chunk"  # how a new prompt's cache is computed
    recompute: bool = False  # the cache of each chunk, in place of clean passes

    @property
    def window_tokens(self) -> int:
        """The most tokens that a chunk attends to, its own included."""
        return self.window * self.tokens_per_frame

    @property
    def sink_tokens(self) -> int:
        """Tokens of the attention sink."""
        return self.sink * self.tokens_per_frame

    @property
    def capacity(self) -> int:
        """Tokens that a cache holds at most."""
        frames = self.window + (self.chunk if self.trim == "after" else 0)
        return frames * self.tokens_per_frame


def lay_out(
    chunks: int, *, chunk_frames: int, context: int = 0, clean_frames: int = 0,
    independent_first_frame: bool = False,
) -> tuple[tuple[Span, ...], tuple[Span, ...]]:  # fmt: skip
    """Spans of `context` latent frames of initial context, and of the `chunks` that follow.

    With `independent_first_frame` the video's first latent frame is a chunk by itself. The first of
    the `chunks` begins with `clean_frames`. Raises PlanError if the context does not fill whole
    chunks.
    """
    alone = 1 if independent_first_frame else 0
    lone, rest = min(alone, context), max(0, context - alone)
    if rest % chunk_frames:
        raise PlanError(
            f"a context of {context} latent frames does not fill chunks of {chunk_frames}.",
            hint=f"use {alone + rest // chunk_frames * chunk_frames or chunk_frames} of them",
        )
    sizes = [1] * lone + [chunk_frames] * (rest // chunk_frames)
    before = len(sizes)
    sizes += [chunk_frames] * chunks
    if independent_first_frame and not context:
        sizes[0] = 1
    firsts = accumulate(sizes[:-1], initial=0)
    spans = [Span(i - before, *pair) for i, pair in enumerate(zip(firsts, sizes, strict=True))]
    spans[before] = replace(spans[before], clean_frames=clean_frames)
    return tuple(spans[:before]), tuple(spans[before:])


def _nearest(value: float, step: int) -> int:
    return max(step, round(value / step) * step)
