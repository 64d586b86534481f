"""Timings of a rollout, chunk by chunk."""

import json
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
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
    generated: bool = True
    tokens: int = 0  # visible to its forwards
    sigmas: list[float] = field(default_factory=list)
    output: ChunkOutput = field(default_factory=ChunkOutput)
    stats: Sequence[ForwardStats] = ()  # of its forwards, with a step cache

    def as_json(self) -> dict[str, Any]:
        """Row of the record, times in milliseconds."""
        timer = self.timer
        return {
            "chunk": self.span.index,
            "made": self.generated,
            "latent_frames": self.span.frames,
            "video_frames": self.output.frames,
            "sigmas": self.sigmas,
            "steps_ms": timer.ms("step"),
            "clean_ms": sum(timer.ms("clean")),
            "decode_ms": sum(timer.ms("decode")),
            "write_ms": 1000 * self.output.write_s,
            "drift_ms": 1000 * self.output.drift_s,
            "wait_ms": sum(timer.ms("wait")),
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

    def __exit__(self, *_: object) -> None:
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
    """Total seconds by activity; on CUDA saving and drift take theirs beside the others.

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

    `transformer` alone, `with_vae` if there was a video, and by the `wall` clock of the whole loop.
    `rows` is gone through twice.
    """
    frames = sum(row["video_frames"] for row in rows if row["made"])
    seconds = summed(row for row in rows if row["made"])
    transformer = seconds["denoise_s"] + seconds["clean_s"]
    times = {"transformer": transformer}
    if seconds["decode_s"]:
        times["with_vae"] = transformer + seconds["decode_s"]
    times["wall"] = wall_s
    return {name: frames / time for name, time in times.items() if time and frames}
