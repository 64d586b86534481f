"""Timings of a rollout, chunk by chunk."""

import json
import math
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from wancli.catalog.geometry import Span
from wancli.errors import OutputError
from wancli.models.timer import Timer
from wancli.records.record import ForwardStats, reuse_json
from wancli.rollouts.sink import ChunkOutput
from wancli.rollouts.store import HINT
from wancli.utils.files import remove

MAX_ROWS = 500  # at either end, that a record repeats; only the file has all


@dataclass
class ChunkTiming:
    """Timing of one chunk."""

    span: Span
    timer: Timer
    began: Timer  # with the rollout
    generated: bool = True
    tokens: int = 0  # visible to its forwards
    sigmas: list[float] = field(default_factory=list)
    output: ChunkOutput = field(default_factory=ChunkOutput)
    stats: Sequence[ForwardStats] = ()  # of its forwards, with a step cache

    def as_json(self) -> dict[str, Any]:
        """Row of the record, times in milliseconds; `at_ms` is when they began in the rollout."""
        timer, decode = self.timer, self.output.decode
        at = {name: timer.start_ms(name, since=self.began) for name in ("step", "clean")}
        if decode:
            at["decode"] = decode.start_ms("decode", since=self.began)
        return {
            "chunk": self.span.index,
            "made": self.generated,
            "latent_frames": self.span.frames,
            "video_frames": self.output.frames,
            "sigmas": self.sigmas,
            "steps_ms": timer.ms("step"),
            "clean_ms": sum(timer.ms("clean")),
            "decode_ms": sum(decode.ms("decode")) if decode else 0.0,
            "write_ms": 1000 * self.output.write_s,
            "drift_ms": 1000 * self.output.drift_s,
            "wait_ms": sum(timer.ms("wait")),
            "at_ms": {name: ms for name, ms in at.items() if ms is not None},
            "kv_tokens": self.tokens,
            **({"reuse": reuse_json(self.stats)} if self.stats else {}),
        }


class TimingLog:
    """Rows of all chunks in a JSON Lines file, not in memory.

    Replaces an earlier file: a resumed rollout goes through all of its chunks again. Without a
    path the file has no name, and ends with the log.
    """

    def __init__(self, path: Path | None) -> None:
        """Raises OutputError."""
        self._path = path
        try:
            if path is None:
                self._file = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
            else:
                remove(path)  # follows no link, and leaves readers of the earlier file alone
                self._file = path.open("x+", encoding="utf-8")
        except OSError as error:
            raise self._failure(error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        with suppress(OSError):  # every line was flushed, and a full disk already reported
            self._file.close()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Iterate over all rows, once all are added."""
        self._file.seek(0)
        return map(json.loads, self._file)

    def add(self, row: ChunkTiming) -> None:
        """Append a row and flush it. Raises OutputError."""
        try:
            self._file.write(json.dumps(row.as_json()) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._failure(error) from None

    def ends(self, count: int = MAX_ROWS) -> list[dict[str, Any]]:
        """The first and the last `count` rows."""
        rows = iter(self)
        first = list(islice(rows, count))
        return first + list(deque(rows, maxlen=count))

    def _failure(self, error: OSError) -> OutputError:
        place = self._path or tempfile.gettempdir()
        return OutputError(f"cannot write {place}: {error.strerror}.", hint=HINT)


_SECONDS = {
    "denoise_s": "steps_ms",
    "clean_s": "clean_ms",
    "decode_s": "decode_ms",
    "save_s": "write_ms",
    "drift_s": "drift_ms",
    "wait_s": "wait_ms",
}


def summed(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Total seconds by activity, each in its own lane: they may add up to more than passed.

    `wait_s` is how long denoising stood still for the stages behind it.
    """
    seconds = dict.fromkeys(_SECONDS, 0.0)
    for row in rows:
        for name, key in _SECONDS.items():
            ms = row[key]
            seconds[name] += (sum(ms) if isinstance(ms, list) else ms) / 1000
    return seconds


def reuse(rows: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Reuse by the step cache, summed over all chunks."""
    total = Counter[str]()
    for row in rows:
        total.update(row.get("reuse", {}))
    return {name: total[name] for name in reuse_json(())}


def rates(rows: Iterable[dict[str, Any]], wall_s: float) -> dict[str, float]:
    """Video frames per second of generated chunks.

    `transformer` by the time of denoising and clean passes alone, `with_vae` (if there was a video)
    by the time in which denoising or decoding ran, counted once where both did, and by the `wall`
    clock of the whole loop. `rows` is gone through several times.
    """
    frames = sum(row["video_frames"] for row in _made(rows))
    seconds = summed(_made(rows))
    times = {"transformer": seconds["denoise_s"] + seconds["clean_s"]}
    if seconds["decode_s"]:
        times["with_vae"] = _union_s(busy for row in _made(rows) for busy in _busy(row))
    times["wall"] = wall_s
    return {name: frames / time for name, time in times.items() if time and frames}


def _made(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return (row for row in rows if row["made"])


def _busy(row: Mapping[str, Any]) -> Iterator[tuple[float, float]]:
    """When the model and the VAE worked on a chunk: from and to, in milliseconds."""
    lengths = {"step": sum(row["steps_ms"]), "clean": row["clean_ms"], "decode": row["decode_ms"]}
    for name, start in row["at_ms"].items():
        yield start, start + lengths[name]


def _union_s(intervals: Iterable[tuple[float, float]]) -> float:
    """Seconds in which at least one of the intervals (in milliseconds) runs."""
    total, covered = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, covered))
        covered = max(covered, end)
    return total / 1000
