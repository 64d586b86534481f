"""Statistics of video frames, of latents, and of series. Pure functions."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]  # [H, W, 3]
Values = NDArray[np.float64]

BT709 = (0.2126, 0.7152, 0.0722)
MAX_CHUNKS = 500  # of a series of which all pairs are compared


def frame_statistics(frame: Frame) -> tuple[float, ...]:
    """Luma, dark, bright, saturation, colourfulness, contrast and detail of [H, W, 3].

    Colourfulness is eq. 1 to 3 of Hasler and Suesstrunk 2003, "Measuring colourfulness in natural
    images". Saturation is HSV's with pixels weighted by their value, since near black it is noise.
    """
    planes = np.ascontiguousarray(frame.transpose(2, 0, 1), dtype=np.float32)
    red, green, blue = planes
    luma = BT709[0] * red + BT709[1] * green + BT709[2] * blue
    value = planes.max(0)
    across, along = red - green, (red + green) / 2 - blue
    return (
        float(luma.mean()) / 255,
        float((luma < 0.02 * 255).mean()),
        float((luma > 0.98 * 255).mean()),
        float((value - planes.min(0)).sum() / max(value.sum(), 1)),
        math.hypot(across.std(), along.std()) + 0.3 * math.hypot(across.mean(), along.mean()),
        float(luma.std()) / 255,
        float((np.diff(luma, 2, 0)[:, 1:-1] + np.diff(luma, 2, 1)[1:-1]).var()),
    )


def change(one: Frame, other: Frame) -> float:
    """Mean absolute difference in 8-bit levels."""
    return float((np.maximum(one, other) - np.minimum(one, other)).mean())


def motion(frames: NDArray[np.uint8]) -> float:
    """Mean change between consecutive video frames [T, H, W, 3], in 8-bit levels; 0 for one."""
    changes = [change(one, other) for one, other in pairwise(frames)]
    return float(np.mean(changes)) if changes else 0.0


def channel_statistics(latents: Values) -> Values:
    """Mean and standard deviation of every channel, [2, C], of latents [1, C, F, H, W]."""
    channels = latents[0].reshape(latents.shape[1], -1)
    return np.stack([channels.mean(1), channels.std(1)])


def shift_and_spread(statistics: Values, reference: Values) -> tuple[float, float]:
    """RMS shift of channel means, in deviations of `reference`; ratio of the deviations."""
    (mean, deviation), (reference_mean, reference_deviation) = statistics, reference
    unit = np.maximum(reference_deviation, 1e-6)
    shift = np.sqrt(np.mean(((mean - reference_mean) / unit) ** 2))
    return float(shift), float(np.mean(deviation / unit))


def mean_rows(rows: Values) -> Values:
    """Mean of the finite values of every column; nan if there are none."""
    finite = np.isfinite(rows)
    return share(np.where(finite, rows, 0).sum(0), finite.sum(0))


def share(total: Values, count: NDArray[np.int64]) -> Values:
    """`total` / `count`; nan where `count` is 0."""
    out: Values = np.full(total.shape, np.nan)
    np.divide(total, count, out=out, where=count > 0)
    return out


def median_slope(x: Values, y: Values) -> float:
    """Theil-Sen estimator: the median slope over pairs of finite points; nan for fewer than two."""
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if len(x) < 2:
        return math.nan
    some = np.unique(np.linspace(0, len(x) - 1, min(len(x), MAX_CHUNKS)).round().astype(int))
    one, other = (some[i] for i in np.triu_indices(len(some), 1))
    return float(np.median((y[other] - y[one]) / (x[other] - x[one])))


def noise(values: Values) -> float:
    """Robust standard deviation around a linear trend, from the median second difference."""
    bends = np.abs(np.diff(values[np.isfinite(values)], 2))
    return 1.4826 / math.sqrt(6) * float(np.median(bends)) if len(bends) else 0.0


def tidy(value: float) -> Any:
    """Four significant digits; None for nan and infinity."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
