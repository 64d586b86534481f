"""Where a rollout's time went, chunk by chunk."""

import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
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
from wancli.rollout.sink import ChunkOutput
from wancli.rollout.store import HINT
from wancli.utils.files import remove

MOST = 500  # rows at either end that a record repeats; in between only the file has them


@dataclass
class ChunkTiming:
    """The times of one chunk, in milliseconds."""

    span: Span
    clock: Timer
    made: bool = True
    tokens: int = 0  # that its forwards attend to
    sigmas: list[float] = field(default_factory=list)
    shown: ChunkOutput = field(default_factory=ChunkOutput)
    uses: Sequence[ForwardStats] = ()  # of its forwards, where any may be reused

    def as_json(self) -> dict[str, Any]:
        """For the record."""
        return {
            "chunk": self.span.index,
            "made": self.made,
            "latent_frames": self.span.frames,
            "video_frames": self.shown.frames,
            "sigmas": self.sigmas,
            "steps_ms": self.clock.ms("step"),
            "clean_ms": sum(self.clock.ms("clean")),
            "decode_ms": 1000 * self.shown.decode_s,
            "write_ms": 1000 * self.shown.write_s,
            "kv_tokens": self.tokens,
            **({"reuse": reuse_json(self.uses)} if self.uses else {}),
        }


class TimingLog:
    """The rows of all chunks: a line of JSON each, in a file and not in memory.

    The file is begun anew, for a resumed rollout goes through all of its chunks again.
    """

    def __init__(self, path: Path) -> None:
        """Raises OutputError."""
        self._path = path
        try:
            remove(path)  # never through a link, and no reader of the earlier one is cut short
            self._file = path.open("x+", encoding="utf-8")
        except OSError as error:
            raise self._failure(error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        with suppress(OSError):  # every line was flushed; a full disk has been told of already
            self._file.close()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """From the first; once all are added."""
        self._file.seek(0)
        return map(json.loads, self._file)

    def add(self, row: ChunkTiming) -> None:
        """One more line, in the file when this returns. Raises OutputError."""
        try:
            self._file.write(json.dumps(row.as_json()) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._failure(error) from None

    def ends(self, most: int = MOST) -> list[dict[str, Any]]:
        """All of them, but no more than the first and the last `most`."""
        rows = iter(self)
        first = list(islice(rows, most))
        return first + list(deque(rows, maxlen=most))

    def _failure(self, error: OSError) -> OutputError:
        return OutputError(f"cannot write {self._path}: {error.strerror}.", hint=HINT)


def summed(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Seconds of all chunks, by what they were spent on."""
    spent = dict.fromkeys(("denoise_s", "clean_s", "decode_s", "save_s"), 0.0)
    for row in rows:
        spent["denoise_s"] += sum(row["steps_ms"]) / 1000
        spent["clean_s"] += row["clean_ms"] / 1000
        spent["decode_s"] += row["decode_ms"] / 1000
        spent["save_s"] += row["write_ms"] / 1000
    return spent


def reuse(rows: Iterable[dict[str, Any]]) -> dict[str, int]:
    """What the forwards of all chunks come to."""
    total = Counter[str]()
    for row in rows:
        total.update(row.get("reuse", {}))
    return {name: total[name] for name in reuse_json(())}


def rates(rows: Iterable[dict[str, Any]], wall_s: float) -> dict[str, float]:
    """Video frames a second of the chunks that were made: the transformer alone, with the VAE where
    it decoded them, and by the wall clock of the whole loop."""
    frames = sum(row["video_frames"] for row in rows if row["made"])
    spent = summed(row for row in rows if row["made"])
    transformer = spent["denoise_s"] + spent["clean_s"]
    named = {"transformer": transformer}
    if spent["decode_s"]:
        named["with_vae"] = transformer + spent["decode_s"]
    named["wall"] = wall_s
    return {name: frames / seconds for name, seconds in named.items() if seconds and frames}
