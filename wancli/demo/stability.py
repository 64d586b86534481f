"""Drift of a long rollout: its last chunks against its first ones.

A model that continues its own chunks can drift: frames get brighter, shapes grow or slow down.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from torch import Tensor

from wancli.demo.judge import measure

CHUNKS = 100
END = 0.1  # fraction of the video that is compared, at both ends
LIMIT = 5.0  # percent
STILL = 0.02  # sides per second; below, an object counts as still


@dataclass(frozen=True)
class Change:
    """Change from the first part of a video to the last, in percent."""

    exposure: float
    area: float
    speed: float | None  # None for a still object


def last_part(video: Tensor) -> Tensor:
    """Last part of frames [T, ...]."""
    return video[-round(len(video) * END) :]


def change(video: Tensor, color: str) -> Change:
    """Change of uint8 [T, H, W, 3] with an object of that color."""
    last = last_part(video)
    before, after = measure(video[: len(last)], color), measure(last, color)
    return Change(
        exposure=_percent(before.exposure, after.exposure),
        area=_percent(before.area, after.area),
        speed=_percent(before.speed, after.speed) if before.speed > STILL else None,
    )


def mean_changes(changes: Sequence[Change]) -> dict[str, float]:
    """Mean absolute change of each measure over videos, in percent."""
    rows = [asdict(one) for one in changes]
    sizes = {name: [abs(row[name]) for row in rows if row[name] is not None] for name in rows[0]}
    return {name: fmean(values) for name, values in sizes.items() if values}


def _percent(before: float, after: float) -> float:
    return 100 * (after / before - 1) if before else 100.0
