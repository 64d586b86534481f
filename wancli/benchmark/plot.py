"""Speed-up against likeness, in pixels: what the report draws of a bench's arms."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wancli.benchmark.cases import Arm, Bench

WIDTH, HEIGHT = 720, 380  # pixels of the plot
LEFT, RIGHT, TOP, BOTTOM = 56, 24, 46, 48  # around it
LEAST_SSIM, LEAST_SPEED = 0.02, 0.5  # least spans of its axes, or noise would fill them
FAR = 3  # spans below the rest, from where the floor is told and not shown
LONGEST = 22  # letters of a label
LETTER, ASCENT, DESCENT = 9, 12, 4  # pixels of a label: a letter across, above and below its line
DOT = 7  # half of a dot, with air around it
HEADING = 20  # where the heading above it ends
# From a dot to the line under its name: above it, below it, and so on outwards.
AWAY = [away + way * 16 * k for k in range(12) for away, way in ((-10, -1), (20, 1))]


@dataclass(frozen=True)
class PlotAxis:
    """Values on pixels, in round steps."""

    ticks: tuple[float, ...]
    start: float
    end: float

    def at(self, value: float) -> float:
        """Where a value lies, in pixels; the nearest end for one that is beyond."""
        low, high = self.ticks[0], self.ticks[-1]
        share = (min(max(value, low), high) - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 1)

    @property
    def labels(self) -> list[tuple[float, str]]:
        """Pixels and words of the steps."""
        step = self.ticks[1] - self.ticks[0]
        decimals = max(0, math.ceil(-math.log10(step) - 1e-9))
        return [(self.at(value), f"{value:.{decimals}f}") for value in self.ticks]


@dataclass(frozen=True)
class Box:
    """Pixels that are taken."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: "Box") -> bool:
        """Whether they share any."""
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


def plot_of(bench: Bench) -> dict[str, Any]:
    """Denoising speed-up against the SSIM of the worst video frame, as the template takes it."""
    across, up, shown = _across(bench), *_up(bench)
    points = [_point(arm, across, up) for arm in bench.arms]
    _label(points)
    front = _front(bench.arms)
    line = sorted((point["x"], point["y"]) for point in points if point["arm"] in front)
    floor = bench.floor.ssim_worst if bench.floor else None
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "top": TOP,
        "bottom": HEIGHT - BOTTOM,
        "across": across.labels,
        "up": up.labels,
        "points": points,
        "front": " ".join(f"{x},{y}" for x, y in line),
        "floor": None if floor is None else {"y": up.at(floor), "value": floor, "below": not shown},
        "target": None if bench.target_ssim is None else up.at(bench.target_ssim),
    }


def _across(bench: Bench) -> PlotAxis:
    """Of speed-ups, that of the baseline among them."""
    speeds = [arm.summary.denoise_speed_up for arm in bench.arms]
    low = min(1.0, *(speed.least for speed in speeds))
    high = max(low + LEAST_SPEED, *(speed.most for speed in speeds))
    return _axis(low, high, ends=(LEFT, WIDTH - RIGHT))


def _up(bench: Bench) -> tuple[PlotAxis, bool]:
    """Of SSIM, up to 1; and whether the floor lies on it, or too far below to show the rest."""
    lowest = min(1 - LEAST_SSIM, bench.target_ssim or 1.0, *map(_worst, bench.arms))
    floor = bench.floor.ssim_worst if bench.floor else 1.0
    shown = 1 - floor <= FAR * (1 - lowest)
    lowest = min(lowest, floor) if shown else lowest
    return _axis(lowest, 1.0, ends=(HEIGHT - BOTTOM, TOP)), shown


def _axis(low: float, high: float, *, ends: tuple[float, float]) -> PlotAxis:
    """Round steps from `low` or less to `high` or more."""
    least = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(least))
    step = next(k * power for k in (1, 2, 5, 10) if k * power >= least * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return PlotAxis(tuple(round(i * step, 10) for i in range(first, last + 1)), *ends)


def _point(arm: Arm, across: PlotAxis, up: PlotAxis) -> dict[str, Any]:
    speed = arm.summary.denoise_speed_up
    x, y = across.at(speed.median), up.at(_worst(arm))
    words = arm.name if len(arm.name) <= LONGEST else f"{arm.name[: LONGEST - 1]}…"
    return {
        "arm": arm.name,
        "x": x,
        "y": y,
        "bar": (across.at(speed.least), across.at(speed.most)),
        "words": words,
        "way": -1 if x + LETTER * len(words) > WIDTH else 1,  # of its name
        "tip": f"{arm.name}\n{speed.median:.2f}\N{MULTIPLICATION SIGN} "
        f"({speed.least:.2f} to {speed.most:.2f})\nworst video frame {_worst(arm):.4f}",
    }


def _label(points: Sequence[dict[str, Any]]) -> None:
    """Give every point the nearest line above or below it where its name covers nothing."""
    taken = [Box(p["x"] - DOT, p["y"] - DOT, p["x"] + DOT, p["y"] + DOT) for p in points]
    for point in sorted(points, key=lambda p: (p["y"], p["x"])):
        ends = sorted((point["x"], point["x"] + (LETTER * len(point["words"])) * point["way"]))
        places = [
            Box(ends[0], point["y"] + away - ASCENT, ends[1], point["y"] + away + DESCENT)
            for away in AWAY
        ]
        free = [
            box
            for box in places
            if box.top > HEADING and not any(box.meets(other) for other in taken)
        ]
        taken.append((free or places)[0])
        point["label"] = taken[-1].bottom - DESCENT


def _front(arms: Sequence[Arm]) -> set[str]:
    """Names of those that no other beats in both."""
    at = {arm.name: (arm.summary.denoise_speed_up.median, _worst(arm)) for arm in arms}
    return {
        name
        for name, (speed, ssim) in at.items()
        if not any(o[0] >= speed and o[1] >= ssim and o != (speed, ssim) for o in at.values())
    }


def _worst(arm: Arm) -> float:
    """SSIM of the worst video frame; the baseline is its own measure."""
    return 1.0 if arm.summary.ssim_worst is None else arm.summary.ssim_worst
