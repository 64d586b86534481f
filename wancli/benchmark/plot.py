"""Layout of the report's plot of speed-up against similarity, in pixels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from wancli.benchmark.cases import Arm, Bench

WIDTH, HEIGHT = 720, 380  # pixels of the plot
LEFT, RIGHT, TOP, BOTTOM = 56, 24, 46, 48  # margins
MIN_SSIM_SPAN, MIN_SPEED_SPAN = 0.02, 0.5  # of the axes, so that noise does not fill them
FAR = 3  # spans below the arms: a noise floor further down is named at the bottom instead
MAX_LABEL = 22  # letters
LETTER, ASCENT, DESCENT = 9, 12, 4  # pixels of a label: width of a letter, above and below the line
DOT = 7  # radius of a dot with its margin
HEADING = 20  # bottom of the heading
# Offsets of a label's baseline from its dot: above, below, and so on outwards.
OFFSETS = [start + sign * 16 * k for k in range(12) for start, sign in ((-10, -1), (20, 1))]


@dataclass(frozen=True)
class PlotAxis:
    """Scale from values to pixels, with ticks at round values."""

    ticks: tuple[float, ...]
    start: float
    end: float

    def at(self, value: float) -> float:
        """Pixel of a value, clamped to the axis."""
        low, high = self.ticks[0], self.ticks[-1]
        share = (min(max(value, low), high) - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 1)

    @property
    def labels(self) -> list[tuple[float, str]]:
        """Pixel and text of each tick."""
        step = self.ticks[1] - self.ticks[0]
        decimals = max(0, math.ceil(-math.log10(step) - 1e-9))
        return [(self.at(value), f"{value:.{decimals}f}") for value in self.ticks]


@dataclass(frozen=True)
class Box:
    """A rectangle, in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: "Box") -> bool:
        """Whether the rectangles overlap."""
        in_x = self.left < other.right and other.left < self.right
        return in_x and self.top < other.bottom and other.top < self.bottom


def plot_of(bench: Bench) -> dict[str, Any]:
    """Denoising speed-up against the SSIM of the worst video frame, for the template."""
    bench = replace(bench, arms=tuple(arm for arm in bench.arms if not arm.does_the_same))
    x_axis, (y_axis, floor_shown) = _speed_axis(bench), _ssim_axis(bench)
    points = [_point(arm, x_axis, y_axis) for arm in bench.arms]
    _place_labels(points)
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
        "x_ticks": x_axis.labels,
        "y_ticks": y_axis.labels,
        "points": points,
        "front": " ".join(f"{x},{y}" for x, y in line),
        "floor": None
        if floor is None
        else {"y": y_axis.at(floor), "value": floor, "below": not floor_shown},
        "target": None if bench.target_ssim is None else y_axis.at(bench.target_ssim),
    }


def _speed_axis(bench: Bench) -> PlotAxis:
    """Axis of the speed-ups, including the baseline's 1."""
    speeds = [arm.summary.denoise_speed_up for arm in bench.arms]
    low = min(1.0, *(speed.least for speed in speeds))
    high = max(low + MIN_SPEED_SPAN, *(speed.most for speed in speeds))
    return _axis(low, high, ends=(LEFT, WIDTH - RIGHT))


def _ssim_axis(bench: Bench) -> tuple[PlotAxis, bool]:
    """Axis of SSIM up to 1, and whether it reaches down to the noise floor."""
    lowest = min(1 - MIN_SSIM_SPAN, bench.target_ssim or 1.0, *map(_worst, bench.arms))
    floor = bench.floor.ssim_worst if bench.floor else 1.0
    floor_shown = 1 - floor <= FAR * (1 - lowest)
    lowest = min(lowest, floor) if floor_shown else lowest
    return _axis(lowest, 1.0, ends=(HEIGHT - BOTTOM, TOP)), floor_shown


def _axis(low: float, high: float, *, ends: tuple[float, float]) -> PlotAxis:
    """Axis with at most 6 round steps that cover `low` to `high`."""
    min_step = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(min_step))
    step = next(k * power for k in (1, 2, 5, 10) if k * power >= min_step * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return PlotAxis(tuple(round(i * step, 10) for i in range(first, last + 1)), *ends)


def _point(arm: Arm, x_axis: PlotAxis, y_axis: PlotAxis) -> dict[str, Any]:
    speed = arm.summary.denoise_speed_up
    x, y = x_axis.at(speed.median), y_axis.at(_worst(arm))
    label = arm.name if len(arm.name) <= MAX_LABEL else f"{arm.name[: MAX_LABEL - 1]}…"
    return {
        "arm": arm.name,
        "x": x,
        "y": y,
        "bar": (x_axis.at(speed.least), x_axis.at(speed.most)),
        "label": label,
        "direction": -1 if x + LETTER * len(label) > WIDTH else 1,  # of the label from the dot
        "tooltip": f"{arm.name}\n{speed.median:.2f}\N{MULTIPLICATION SIGN} "
        f"({speed.least:.2f} to {speed.most:.2f})\nworst video frame {_worst(arm):.4f}",
    }


def _place_labels(points: Sequence[dict[str, Any]]) -> None:
    """Place each label on the nearest line above or below its point where it covers nothing."""
    occupied = [Box(p["x"] - DOT, p["y"] - DOT, p["x"] + DOT, p["y"] + DOT) for p in points]
    for point in sorted(points, key=lambda p: (p["y"], p["x"])):
        width = LETTER * len(point["label"]) * point["direction"]
        left, right = sorted((point["x"], point["x"] + width))
        baselines = [point["y"] + offset for offset in OFFSETS]
        places = [Box(left, y - ASCENT, right, y + DESCENT) for y in baselines]
        free = [
            box
            for box in places
            if box.top > HEADING and not any(box.overlaps(other) for other in occupied)
        ]
        occupied.append((free or places)[0])
        point["label_y"] = occupied[-1].bottom - DESCENT


def _front(arms: Sequence[Arm]) -> set[str]:
    """Names of the arms on the Pareto front."""
    points = {arm.name: (arm.summary.denoise_speed_up.median, _worst(arm)) for arm in arms}
    return {
        name
        for name, (speed, ssim) in points.items()
        if not any(p[0] >= speed and p[1] >= ssim and p != (speed, ssim) for p in points.values())
    }


def _worst(arm: Arm) -> float:
    """SSIM of the worst video frame; 1 for the baseline."""
    return 1.0 if arm.summary.ssim_worst is None else arm.summary.ssim_worst
