"""Measure the drift of a rollout chunk by chunk while it runs, without a learned model.

Every video frame gives a row of measures. A chunk is the mean of its rows, and so are the first and
last seconds, which therefore do not depend on the chunk length.
"""

import math
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wancli.video.measures import (
    Values,
    change,
    channel_statistics,
    frame_statistics,
    mean_rows,
    median_slope,
    noise,
    share,
    shift_and_spread,
    tidy,
)

if TYPE_CHECKING:
    from torch import Tensor

WINDOW_S = 5.0  # the first and last seconds that are compared
FIRST_CHUNKS = 3  # the reference for every chunk
STILL = 0.1  # an invisible change between video frames, in 8-bit levels
RATED_S = 10.0  # seconds of video from which a trend has a rate a minute
NOTABLE = 3.0  # units of change over the whole video from which a trend is reported
BAD_SEAM = 2.0
PAUSE_S = 1.0  # without motion at the end, from which it counts as stopped
GROWN = 0.05  # increase in the share of dark or bright pixels from which it is reported

# The unit of a change is the noise between chunks, but at least 2 % of the value and this.
LEAST_UNIT = {
    "luma": 0.01,
    "dark": 0.01,
    "bright": 0.01,
    "saturation": 0.02,
    "colourfulness": 1.0,
    "contrast": 0.005,
    "detail": 1.0,
    "motion": STILL,
    "seam": 1 / 3,  # BAD_SEAM is NOTABLE units above 1
    "latent_shift": 0.1,
    "latent_std": 0.02,
}
# Measures in notes, with their units.
WORDS = {
    "luma": "exposure (0 to 1)",
    "motion": "motion (levels per frame)",
    "saturation": "saturation (0 to 1)",
    "contrast": "contrast (0 to 1)",
    "detail": "detail (levels²)",
    "latent_std": "latent std (relative to the first chunks)",
}
# The columns of a row: seven of `frame_statistics`, two of changes, two of latents.
MEASURES = tuple(LEAST_UNIT)


@dataclass(frozen=True)
class ChunkDrift:
    """Measures of one chunk; nan if undefined, such as motion in a single video frame."""

    index: int
    first_frame: int  # video frame
    frames: int
    start_s: float
    luma: float  # mean, BT.709, 0 to 1
    dark: float  # share of pixels with luma under 2 %
    bright: float  # share of pixels with luma over 98 %
    saturation: float  # 0 to 1
    colourfulness: float  # 0 is gray, 33 moderate, 109 extreme
    contrast: float  # RMS: standard deviation of luma, 0 to 1
    detail: float  # variance of luma's Laplacian, 8-bit levels squared
    motion: float  # mean change between consecutive video frames of the chunk, 8-bit levels
    seam: float  # change from the previous chunk over the median change inside; about 1 is good
    latent_shift: float  # channel means minus those of the first chunks, in their deviations
    latent_std: float  # deviation of the channels over that of the first chunks

    def as_json(self) -> dict[str, Any]:
        """Measures with four significant digits, None for nan."""
        tidied = {name: tidy(getattr(self, name)) for name in MEASURES}
        return {**asdict(self), "start_s": round(self.start_s, 3), **tidied}


class DriftMeter:
    """Measures chunks one by one. Holds one video frame, 10 s of rows, and 120 bytes a chunk."""

    def __init__(self, fps: float) -> None:
        self.fps = fps
        self.frames = 0
        self._chunks = array("d")  # fields of all chunks, concatenated
        self._frame: NDArray[np.uint8] | None = None  # the last one
        self._moves: list[float] = []  # changes inside the last chunk
        self._latents: list[Values] = []  # statistics of the first chunks
        self._window = max(1, round(WINDOW_S * fps))
        self._first: list[Values] = []
        self._last: deque[Values] = deque(maxlen=self._window)
        self._sum = np.zeros(len(MEASURES))
        self._count = np.zeros(len(MEASURES), np.int64)

    def add(
        self, frames: NDArray[np.uint8], latents: "Tensor | NDArray[Any]", *, index: int
    ) -> ChunkDrift:
        """Measure the next chunk: uint8 [T, H, W, 3], decoded from latents [1, C, F, H, W]."""
        moves = [change(one, other) for one, other in pairwise(frames)]
        seams = [self._seam(frames[0], moves), *(math.nan for _ in moves)]
        rows = np.empty((len(frames), len(MEASURES)))
        rows[:, :7] = [frame_statistics(frame) for frame in frames]
        rows[:, 7:9] = list(zip([math.nan, *moves], seams, strict=True))
        rows[:, 9:] = self._shift_and_spread(latents)
        start_s, values = self.frames / self.fps, mean_rows(rows).tolist()
        chunk = ChunkDrift(index, self.frames, len(frames), start_s, *values)
        self._chunks.extend(astuple(chunk))
        self._frame, self._moves = frames[-1].copy(), moves  # a view would hold the whole chunk
        self._add_rows(rows)
        return chunk

    @property
    def chunks(self) -> list[ChunkDrift]:
        """All chunks measured so far."""
        rows = np.reshape(self._chunks, (-1, len(fields(ChunkDrift)))).tolist()
        return [ChunkDrift(*map(int, row[:3]), *row[3:]) for row in rows]

    def summary(self) -> dict[str, Any]:
        """Everything as JSON: first and last seconds, slopes, worst chunks, notes, chunks."""
        window = min(self._window, math.ceil(self.frames / 2))  # short video: its halves
        first, last = self._first[:window], list(self._last)[-window:]
        chunks = self.chunks
        series = {name: _Series(name, chunks, self.fps) for name in MEASURES}
        summary = {
            "fps": self.fps,
            "frames": self.frames,
            "duration_s": round(self.frames / self.fps, 3),
            "first_chunks": min(FIRST_CHUNKS, len(chunks)),
            "window_s": round(window / self.fps, 3),
            "first": _by_name(mean_rows(np.reshape(first, (-1, len(MEASURES))))),
            "last": _by_name(mean_rows(np.reshape(last, (-1, len(MEASURES))))),
            "mean": _by_name(share(self._sum, self._count)),
            "slope_per_minute": {name: tidy(s.slope) for name, s in series.items()},
            "worst": {name: worst for name, s in series.items() if (worst := s.worst())},
            "chunks": [chunk.as_json() for chunk in chunks],
        }
        return {**summary, "notes": _notes(series, summary) if chunks else []}

    def _seam(self, frame: NDArray[np.uint8], moves: list[float]) -> float:
        """The change to `frame` over the median one in the livelier of the two chunks.

        nan for the first chunk, and without motion.
        """
        reference = max((float(np.median(m)) for m in (self._moves, moves) if m), default=math.nan)
        across = math.nan if self._frame is None else change(self._frame, frame)
        return across / max(reference, STILL) if max(across, reference) >= STILL else math.nan

    def _shift_and_spread(self, latents: "Tensor | NDArray[Any]") -> tuple[float, float]:
        array = latents if isinstance(latents, np.ndarray) else latents.float().numpy(force=True)
        statistics = channel_statistics(array.astype(np.float64))
        if len(self._latents) < FIRST_CHUNKS:
            self._latents.append(statistics)
        return shift_and_spread(statistics, np.mean(self._latents, 0))

    def _add_rows(self, rows: Values) -> None:
        self.frames += len(rows)
        self._first.extend(row.copy() for row in rows[: self._window - len(self._first)])
        self._last.extend(row.copy() for row in rows[-self._window :])
        self._sum += np.where(np.isfinite(rows), rows, 0).sum(0)
        self._count += np.isfinite(rows).sum(0)


class _Series:
    """One measure over the chunks."""

    def __init__(self, name: str, chunks: Sequence[ChunkDrift], fps: float) -> None:
        self.name = name
        self.chunks = chunks
        self.values = np.array([getattr(chunk, name) for chunk in chunks])
        # At the middle of a chunk, where a linear trend equals its mean.
        self.minutes = np.array([c.first_frame + (c.frames - 1) / 2 for c in chunks]) / fps / 60

    @cached_property
    def reference(self) -> float:
        """The reference value: the mean of the first chunks, 1 for seams."""
        finite = self.values[np.isfinite(self.values)][:FIRST_CHUNKS]
        return 1.0 if self.name == "seam" else float(finite.mean()) if len(finite) else math.nan

    @cached_property
    def unit(self) -> float:
        """The noise between chunks, but at least 2 % of the reference value and LEAST_UNIT."""
        if self.name == "seam":  # bad seams are not noise, and a good one is known
            return LEAST_UNIT[self.name]
        return max(noise(self.values), LEAST_UNIT[self.name], 0.02 * abs(self.reference))

    @cached_property
    def slope(self) -> float:
        """The median slope per minute."""
        return median_slope(self.minutes, self.values)

    @property
    def drifts(self) -> bool:
        """Whether the change over the whole video is notable."""
        return abs(self.slope) * float(np.ptp(self.minutes)) > NOTABLE * self.unit

    def worst(self) -> dict[str, Any] | None:
        """The chunk farthest from the reference value, in units of change."""
        distances = np.abs(self.values - self.reference) / self.unit
        if not np.isfinite(distances).any():
            return None
        chunk = self.chunks[(at := int(np.nanargmax(distances)))]
        return {
            "chunk": chunk.index,
            "start_s": round(chunk.start_s, 3),
            "value": tidy(self.values[at]),
            "usual": tidy(self.reference),
            "distance": tidy(distances[at]),
        }


def _by_name(row: Values) -> dict[str, float | None]:
    return {name: tidy(value) for name, value in zip(MEASURES, row, strict=True)}


def _notes(series: Mapping[str, _Series], summary: Mapping[str, Any]) -> list[str]:
    """Findings in plain words; exposure and motion first, always together."""
    notes = [f"{_trend(series['luma'], summary)}; {_motion(series['motion'], summary)}"]
    for name in ("saturation", "contrast", "detail", "latent_std"):
        if _trends(series[name], summary):
            notes.append(_trend(series[name], summary))
    for name in ("dark", "bright"):
        first, last = summary["first"][name], summary["last"][name]
        if last - first > GROWN:
            notes.append(f"{name} pixels grow from {first:.0%} to {last:.0%} of the picture")
    return [*notes, *_seams(series["seam"])]


def _trend(series: _Series, summary: Mapping[str, Any]) -> str:
    word = WORDS[series.name]
    first, last = summary["first"][series.name], summary["last"][series.name]
    if first is None or last is None:
        return f"{word} unknown"
    if not _trends(series, summary):
        return f"{word} steady at {_short(first)}"
    verb = "rises" if series.slope > 0 else "falls"
    rated = float(np.ptp(series.minutes)) * 60 >= RATED_S
    rate = f" {_short(abs(series.slope))} a minute," if rated else ""
    return f"{word} {verb}{rate} from {' to '.join(_distinct(first, last))}"


def _trends(series: _Series, summary: Mapping[str, Any]) -> bool:
    """Whether a measure drifts, and the last seconds differ from the first."""
    return series.drifts and summary["first"][series.name] != summary["last"][series.name]


def _motion(series: _Series, summary: Mapping[str, Any]) -> str:
    """Motion up to the end: a frozen video is steady in all other measures."""
    moving = np.flatnonzero(series.values > max(STILL, 0.1 * series.reference))
    if np.isfinite(series.values).any() and not len(moving):
        return "nothing moves"
    if len(moving) and (series.minutes[-1] - series.minutes[moving[-1]]) * 60 >= PAUSE_S:
        return f"motion stops after chunk {series.chunks[moving[-1]].index}"
    return _trend(series, summary)


def _seams(series: _Series) -> list[str]:
    bad = np.flatnonzero(series.values > BAD_SEAM)
    if not len(bad):
        return []
    at = int(np.nanargmax(series.values))
    note = f"seam {_short(series.values[at])} at chunk {series.chunks[at].index}"
    if len(bad) > 1:
        boundaries = np.isfinite(series.values).sum()
        note += f", over {BAD_SEAM:g} at {len(bad)} of {boundaries} boundaries"
    return [note]


def _distinct(*values: float) -> list[str]:
    """Values in two significant digits, or in as many of the record's four as tell them apart."""
    texts = [[_short(value, digits) for value in values] for digits in (2, 3, 4)]
    return next((each for each in texts if len(set(each)) == len(values)), texts[-1])


def _short(value: float, digits: int = 2) -> str:
    """Significant digits without an exponent."""
    return f"{float(f'{value:.{digits}g}'):,.10g}"
