"""Whether a long rollout stays what it was: its last chunks beside its first ones.

A model that goes on from its own chunks can drift: pictures get brighter, shapes grow or slow down.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from torch import Tensor

from wancli.demo.judge import measure

CHUNKS = 100
END = 0.1  # of the video, at its start and at its end
LIMIT = 5.0  # percent
STILL = 0.02  # sides per second; below, nothing moves


@dataclass(frozen=True)
class Change:
    """From the first part of a video to the last, in percent."""

    exposure: float
    area: float
    speed: float | None  # None of what stays where it is


def last_part(video: Tensor) -> Tensor:
    """Of frames [T, ...]."""
    return video[-round(len(video) * END) :]


def change(video: Tensor, color: str) -> Change:
    """How uint8 [T, H, W, 3] with an object of that colour has changed at its end."""
    last = last_part(video)
    before, after = measure(video[: len(last)], color), measure(last, color)
    return Change(
        exposure=_percent(before.exposure, after.exposure),
        area=_percent(before.area, after.area),
        speed=_percent(before.speed, after.speed) if before.speed > STILL else None,
    )


def mean_sizes(changes: Sequence[Change]) -> dict[str, float]:
    """By what changes, the mean over videos of how much, in percent, up or down."""
    told = [asdict(one) for one in changes]
    sizes = {name: [abs(one[name]) for one in told if one[name] is not None] for name in told[0]}
    return {name: fmean(values) for name, values in sizes.items() if values}


def _percent(before: float, after: float) -> float:
    return 100 * (after / before - 1) if before else 100.0
