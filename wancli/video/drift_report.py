"""Drift report: the summary of a `DriftMeter` as one HTML page without scripts or links."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wancli.utils.files import write_whole
from wancli.utils.html import is_page, page_mark, templates
from wancli.video.drift import NOTABLE

WIDE, NARROW, HEIGHT = 980, 476, 352  # pixels of a chart
LEFT, RIGHT, TOP, BOTTOM, GAP = 50, 10, 20, 38, 34  # around panels; a label stands in the gap
_KIND = "drift report"
NONE = "\N{EN DASH}"
MOST_POINTS = 400  # on a line
MOST_DOTS = 64
BAND, NUMBER = 12, 40  # least pixels of a chunk, or of some, and between their numbers

Chunk = Mapping[str, Any]
Point = tuple[float, float]  # pixels


@dataclass(frozen=True)
class Measure:
    """Label, unit and axis of one measure."""

    name: str  # in the summary
    label: str
    unit: str
    least_span: float  # of its axis, so that noise does not fill it
    from_zero: bool = False

    def text(self, value: float | None, *, sign: str = "") -> str:
        """A number with decimals to a hundredth of the span."""
        if value is None:
            return NONE
        decimals = max(0, 2 - math.floor(math.log10(self.least_span)))
        value = round(value, decimals) + 0.0  # no minus before zero
        return f"{value:{sign if value else ''},.{decimals}f}".replace("-", "\N{MINUS SIGN}")


@dataclass(frozen=True)
class Chart:
    """Measures above each other, on one time axis."""

    title: str
    about: str
    measures: Sequence[Measure]
    width: int = NARROW


LUMA = Measure("luma", "exposure", "mean luma, 0 to 1", 0.2)
MOTION = Measure("motion", "motion", "8-bit levels a video frame", 1.0, from_zero=True)
SATURATION = Measure("saturation", "saturation", "0 to 1", 0.2)
COLOURFULNESS = Measure("colourfulness", "colourfulness", "0 is gray, 109 extreme", 20.0)
CONTRAST = Measure("contrast", "contrast", "RMS, 0 to 1", 0.1)
DETAIL = Measure("detail", "detail", "variance of the Laplacian", 20.0, from_zero=True)
SEAM = Measure("seam", "seam", "change across, in usual changes inside", 2.5, from_zero=True)
SHIFT = Measure("latent_shift", "latent mean", "shift, in deviations", 0.5, from_zero=True)
SPREAD = Measure("latent_std", "latent std", "in that of the first chunks", 0.2)
DARK = Measure("dark", "dark pixels", "share under 2 % luma", 0.1, from_zero=True)
BRIGHT = Measure("bright", "bright pixels", "share over 98 % luma", 0.1, from_zero=True)

CHARTS = (
    Chart(
        "Exposure and motion",
        "Read together: a frozen video is steady in all else.",
        (LUMA, MOTION),
        width=WIDE,
    ),
    Chart("Colour", "Falls as colours fade, rises as they burn.", (SATURATION, COLOURFULNESS)),
    Chart("Contrast and detail", "Falls with blur, rises with noise.", (CONTRAST, DETAIL)),
    Chart("Seams", "About 1 where nobody sees a chunk begin.", (SEAM,)),
    Chart("Latents", "Against the first chunks: 0 and 1 are no drift.", (SHIFT, SPREAD)),
)
TABLE = (
    *(LUMA, MOTION, SATURATION, COLOURFULNESS, CONTRAST, DETAIL),
    *(DARK, BRIGHT, SEAM, SHIFT, SPREAD),
)


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels, with ticks at round steps."""

    low: float
    high: float
    start: float
    end: float
    step: float

    def at(self, value: float) -> float:
        """The position of a value in pixels."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Position and label of each tick."""
        decimals = max(0, -math.floor(math.log10(self.step)))
        # Tolerance for rounding: 0.3 / 0.05 is slightly over 6.
        first = math.ceil(self.low / self.step - 1e-9)
        last = math.floor(self.high / self.step + 1e-9)
        values = [i * self.step for i in range(first, last + 1)]
        return [(self.at(value), f"{value:,.{decimals}f}") for value in values]


@dataclass(frozen=True)
class Timeline:
    """Positions of the chunks along a chart."""

    chunks: Sequence[Chunk]
    fps: float
    duration_s: float
    width: int

    @property
    def minutes(self) -> bool:
        """Whether the axis is in minutes."""
        return self.duration_s > 150

    @property
    def axis(self) -> Axis:
        """The time axis in seconds or minutes."""
        high = self.duration_s / (60 if self.minutes else 1)
        end = self.width - RIGHT
        return Axis(0, high, LEFT, end, _round_step(high / (self.width // 90)))

    def at(self, chunk: Chunk, share: float) -> float:
        """The position of a fraction of the chunk in pixels."""
        seconds = chunk["start_s"] + share * chunk["frames"] / self.fps
        return self.axis.at(seconds / (60 if self.minutes else 1))

    def bands(self, measures: Sequence[Measure]) -> list[dict[str, Any]]:
        """Bands of one chunk, or of several if they would be too narrow."""
        pixels = (self.width - LEFT - RIGHT) / len(self.chunks)
        size = _whole_step(BAND / pixels)
        every = _whole_step(NUMBER / pixels / size)
        groups = [self.chunks[i : i + size] for i in range(0, len(self.chunks), size)]
        return [
            {
                "x": self.at(group[0], 0),
                "width": round(self.at(group[-1], 1) - self.at(group[0], 0), 1),
                "label": "" if i % every else group[0]["index"],
                "tip": _tip(group, measures),
            }
            for i, group in enumerate(groups)
        ]


def is_report(path: Path) -> bool:
    """Whether a file is such a page."""
    return is_page(path, _KIND)


def write_report(
    summary: Mapping[str, Any], path: Path, *, title: str, overwrite: bool = False
) -> None:
    """Write `DriftMeter.summary` as a page, atomically.

    Raises OutputError if it cannot be written.
    """
    # A prompt from a shell may not be UTF-8.
    page = _page(summary, title=title).encode(errors="replace")
    hint = "choose another place: `report FILE.html`"
    write_whole(path, page, hint=hint, overwrite=overwrite)


def _page(summary: Mapping[str, Any], *, title: str) -> str:
    environment = templates(Path(__file__).parent)
    charts = [_draw(chart, summary) for chart in CHARTS] if summary["chunks"] else []
    template = environment.get_template("drift_report.html.jinja")
    return template.render(
        mark=page_mark(_KIND), title=title, summary=summary, charts=charts, table=TABLE, far=NOTABLE
    )


def _draw(chart: Chart, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of the template for a chart, in pixels."""
    line = Timeline(summary["chunks"], summary["fps"], summary["duration_s"], chart.width)
    count = len(chart.measures)
    height = (HEIGHT - TOP - BOTTOM) / count - GAP
    tops = [TOP + GAP + i * (height + GAP) for i in range(count)]
    return {
        "chart": chart,
        "height": HEIGHT,
        "left": LEFT,
        "right": chart.width - RIGHT,
        "top": TOP,
        "bottom": HEIGHT - BOTTOM,
        "unit": "minutes" if line.minutes else "seconds",
        "ticks": line.axis.ticks,
        "bands": line.bands(chart.measures),
        "panels": [
            _panel(measure, line, summary["worst"].get(measure.name), (top + height, top))
            for measure, top in zip(chart.measures, tops, strict=True)
        ],
    }


def _panel(
    measure: Measure, line: Timeline, worst: Mapping[str, Any] | None, ends: tuple[float, float]
) -> dict[str, Any]:
    values = [chunk[measure.name] for chunk in line.chunks]
    reference = [worst["usual"]] if worst else []
    axis = _value_axis(measure, [v for v in (*values, *reference) if v is not None], ends)
    points = [
        None if value is None else (line.at(chunk, 0.5), axis.at(value))
        for chunk, value in zip(line.chunks, values, strict=True)
    ]
    far = worst is not None and worst["distance"] >= NOTABLE
    return {
        "measure": measure,
        "top": ends[1],
        "ticks": axis.ticks,
        "usual": [axis.at(value) for value in reference],
        "path": _path(_thin(points)),
        "dots": [p for p in points if p] if len(points) <= MOST_DOTS else [],
        "rings": [
            _ring(chunk, point, axis, reference=worst["usual"])
            for chunk, point in zip(line.chunks, points, strict=True)
            if far and worst and point and chunk["index"] == worst["chunk"]
        ],
    }


def _ring(chunk: Chunk, at: Point, axis: Axis, *, reference: float) -> dict[str, Any]:
    """A ring around a point, labelled on the side away from the line."""
    x, y = at
    below = axis.at(reference) < y < axis.start - 18 or y < axis.end + 12
    return {"x": x, "y": y, "words": f"chunk {chunk['index']}", "dy": 18 if below else -9}


def _value_axis(measure: Measure, values: Sequence[float], ends: tuple[float, float]) -> Axis:
    low, high = min(values, default=0.0), max(values, default=0.0)
    missing = max(0.0, measure.least_span - (high - low))
    low = 0.0 if measure.from_zero else max(0.0, low - missing / 2)
    high = max(high, low + measure.least_span)
    step = _round_step((high - low) / 4)
    return Axis(math.floor(low / step) * step, math.ceil(high / step) * step, *ends, step)


def _round_step(least: float) -> float:
    """The first of 1, 2, 5, 10, 20 and so on (times any power of ten) that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= least * (1 - 1e-9))


def _whole_step(least: float) -> int:
    return round(_round_step(max(1.0, least)))


def _thin(points: Sequence[Point | None]) -> list[Point | None]:
    """Keep the lowest and highest of every few points, so that no peak is lost."""
    size = math.ceil(2 * len(points) / MOST_POINTS) if len(points) > MOST_POINTS else 1
    out: list[Point | None] = []
    for first in range(0, len(points), size):
        finite = [point for point in points[first : first + size] if point]
        low, high = (pick(finite, key=lambda p: p[1], default=None) for pick in (min, max))
        out.extend(sorted({p for p in (low, high) if p}) or [None])
    return out


def _path(points: Sequence[Point | None]) -> str:
    """SVG path data (`d`), with gaps at missing points."""
    pairs = zip([None, *points], points, strict=False)
    # h0 draws an isolated point as a dot.
    return "".join(f"{'L' if before else 'M'}{p[0]},{p[1]}h0" for before, p in pairs if p)


def _tip(group: Sequence[Chunk], measures: Sequence[Measure]) -> str:
    """The tooltip of some chunks, one line per measure."""
    first, last = group[0], group[-1]
    chunks = f"chunk {first['index']}" + (f" to {last['index']}" if last is not first else "")
    lines = [f"{chunks}, from {first['start_s']:.1f} s"]
    for measure in measures:
        values = [chunk[measure.name] for chunk in group if chunk[measure.name] is not None]
        ends = sorted({measure.text(v) for v in (min(values), max(values))}) if values else []
        lines.append(f"{measure.label}: {' to '.join(ends) or 'unknown'}")
    return "\n".join(lines)
