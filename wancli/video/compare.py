"""Quality of one video, or of latents, against another. Imports no torch at the top."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from wancli.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Frames = NDArray[np.uint8] | Tensor  # uint8 [T, H, W, 3]

WINDOW = 11  # pixels of the Gaussian of SSIM
VARIANT = f"SSIM ({WINDOW}x{WINDOW} Gaussian, per channel)"
CHUNK = 4  # video frames at once


@dataclass(frozen=True)
class Measured:
    """One measure over a video: its mean, its worst value, and that video frame (from 0)."""

    mean: float
    worst: float
    frame: int


@dataclass(frozen=True)
class Quality:
    """A video against another of the same size; levels are 0 to 255."""

    frames: int
    ssim: Measured
    mse: Measured  # levels squared
    temporal_levels: Measured | None  # of the change to `frame`; None for a single video frame
    max_levels: int
    equal: bool

    @property
    def psnr_db(self) -> float | None:
        """PSNR of the squared error over all video frames; None without a difference."""
        return psnr(self.mse.mean)

    def as_json(self) -> dict[str, Any]:
        """All fields, and PSNR."""
        worst = {"worst": psnr(self.mse.worst), "frame": self.mse.frame}
        return {**asdict(self), "psnr_db": {"mean": self.psnr_db, **worst}}


@dataclass(frozen=True)
class LatentQuality:
    """Latents against others of the same shape."""

    max_abs: float
    relative: float | None  # norm of the difference over that of the first; None for all zeros
    psnr_db: float | None  # over the range of the first; None without a difference
    equal: bool

    def as_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


class QualityMeter:
    """Compares two videos chunk by chunk; holds one video frame and a few numbers per frame."""

    def __init__(self) -> None:
        self._ssim: list[float] = []
        self._mse: list[float] = []
        self._temporal: list[float] = []
        self._max = 0
        self._last: Tensor | None = None

    def add(self, one: "Frames", other: "Frames") -> None:
        """Compare the next video frames of both, uint8 [T, H, W, 3]. Raises UsageError."""
        import torch

        if not str(one.dtype).endswith("uint8") or not str(other.dtype).endswith("uint8"):
            raise TypeError(f"video frames are uint8, not {one.dtype} and {other.dtype}")
        if problem := _mismatch(tuple(one.shape), tuple(other.shape)):
            raise problem
        for first in range(0, len(one), CHUNK):
            pair = [torch.as_tensor(frames[first : first + CHUNK]) for frames in (one, other)]
            self._add_chunk(*(frames.permute(0, 3, 1, 2).float() for frames in pair))

    def _add_chunk(self, one: "Tensor", other: "Tensor") -> None:
        import torch
        from pytorch_msssim import ssim

        difference = one - other
        self._max = max(self._max, int(difference.abs().max()))
        self._ssim += ssim(one, other, data_range=255, size_average=False, win_size=WINDOW).tolist()
        self._mse += difference.square().mean((1, 2, 3), dtype=torch.float64).tolist()
        # The difference of the changes equals the change of the difference.
        before = [] if self._last is None else [self._last]
        changes = torch.cat([*before, difference]).diff(dim=0).abs()
        self._temporal += changes.mean((1, 2, 3), dtype=torch.float64).tolist()
        self._last = difference[-1:]

    def quality(self) -> Quality:
        """The quality over everything added. Raises UsageError without video frames."""
        if not self._mse:
            raise UsageError("there are no video frames to compare.", hint="wancli compare A B")
        return Quality(
            frames=len(self._mse),
            ssim=_measured(self._ssim, worst=min),
            mse=_measured(self._mse, worst=max),
            temporal_levels=_measured(self._temporal, first=1) if self._temporal else None,
            max_levels=self._max,
            equal=self._max == 0,
        )


def compare_videos(one: "Frames", other: "Frames") -> Quality:
    """Compare videos, uint8 [T, H, W, 3], on the device of the first. Raises UsageError."""
    meter = QualityMeter()
    meter.add(one, other)
    return meter.quality()


def compare_files(one: Path, other: Path) -> Quality:
    """Compare videos on disk, of any length, a few video frames at a time.

    Raises UsageError, and InputError for an unreadable file.
    """
    from wancli.video.read import probe, stream_frames

    infos = probe(one), probe(other)
    shapes = [(info.frames, info.height, info.width, 3) for info in infos]
    if problem := _mismatch(*shapes):
        raise problem
    meter = QualityMeter()
    streams = [
        stream_frames(path, info=info, chunk=CHUNK)
        for path, info in zip((one, other), infos, strict=True)
    ]
    for pair in zip(*streams, strict=True):
        meter.add(*pair)
    return meter.quality()


def compare_latents(one: "Tensor", other: "Tensor") -> LatentQuality:
    """Compare latents, [B, C, F, H, W]. Raises UsageError."""
    if one.shape != other.shape:
        raise UsageError(
            f"the latents are {_times(one.shape)} and {_times(other.shape)}.",
            hint="generate both with the same model, `num_frames` and `size`",
        )
    reference = one.double()
    difference = reference - other.double()
    norm, distance = float(reference.norm()), float(difference.norm())
    return LatentQuality(
        max_abs=float(difference.abs().max()),
        relative=distance / norm if norm else None,
        psnr_db=psnr(
            float(difference.square().mean()), peak=float(reference.max() - reference.min())
        ),
        equal=distance == 0,
    )


def psnr(mse: float, *, peak: float = 255) -> float | None:
    """PSNR in dB; None for no error, since JSON has no infinity."""
    return 10 * math.log10(peak**2 / mse) if mse and peak else None


def _mismatch(one: tuple[int, ...], other: tuple[int, ...]) -> UsageError | None:
    """The error that videos of these shapes, [T, H, W, 3], cannot be compared; None if they can."""
    frames, height, width, _ = one
    if frames != other[0]:
        return UsageError(
            f"the videos have {frames} and {other[0]} video frames.",
            hint="generate both with the same `num_frames`",
        )
    if one != other:
        return UsageError(
            f"the videos are {width}x{height} and {other[2]}x{other[1]}.",
            hint=f"generate both with `size {width}x{height}`",
        )
    if min(height, width) < WINDOW:
        return UsageError(
            f"the videos are {width}x{height}: SSIM needs {WINDOW} pixels per side.",
            hint="compare their latents (`save_latents`)",
        )
    return None


def _measured(
    values: Sequence[float], *, worst: Callable[..., float] = max, first: int = 0
) -> Measured:
    """Mean and worst of one value per video frame, from video frame `first` on."""
    extreme = worst(values)
    return Measured(fmean(values), extreme, first + values.index(extreme))


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
