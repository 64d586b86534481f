"""How far a batch is: what runs, what failed, and how long the rest takes."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from wancli.records.ledger import FAILED, PENDING, RUNNING, Ledger
from wancli.records.ledger_file import parse_column


@dataclass(frozen=True)
class RunningJob:
    """A job that runs. Its times are by the clock, which may have been changed since."""

    line: int
    attempt: int
    output: str
    host: str
    pid: int
    seconds: float  # since it began
    quiet_s: float  # since its worker last wrote to the ledger
    alive: bool  # or its worker has ended, and the job will be taken again


@dataclass(frozen=True)
class FailedJobs:
    """Jobs that failed for the same reason."""

    message: str
    hint: str
    lines: Sequence[int]
    output: str  # of the first


@dataclass(frozen=True)
class BatchStatus:
    """The state of all jobs of a ledger."""

    counts: Mapping[str, int]
    running: Sequence[RunningJob]
    failed: Sequence[FailedJobs]
    each_s: float | None  # median of recent jobs; None if none is done
    left_s: float | None  # of the rest, with the workers that run now

    @property
    def ended(self) -> bool:
        """Whether no job waits or runs."""
        return not (self.counts[PENDING] or self.counts[RUNNING])


def read_status(ledger: Ledger) -> BatchStatus:
    """Read a ledger that others may be writing to."""
    spent = ledger.seconds()
    now = time.time()
    running = [_running(row, ledger, now) for row in ledger.rows(RUNNING)]
    failed = _by_reason(ledger.rows(FAILED))
    each = median(seconds for _, seconds in spent) if spent else None
    left = None if each is None else _left(ledger, running, spent, each)
    return BatchStatus(ledger.counts(), running, failed, each, left)


def _running(row: Mapping[str, Any], ledger: Ledger, now: float) -> RunningJob:
    return RunningJob(
        line=row["line"], attempt=row["attempt"], output=row["output"], host=row["host"],
        pid=row["pid"], seconds=max(0.0, now - row["began"]),
        quiet_s=max(0.0, now - row["heartbeat"]), alive=ledger.is_alive(row["worker"]),
    )  # fmt: skip


def _by_reason(rows: Iterable[Mapping[str, Any]]) -> list[FailedJobs]:
    lines: dict[tuple[str, str], list[int]] = {}
    first: dict[tuple[str, str], str] = {}
    for row in rows:
        error = parse_column(row, "error")
        reason = error["message"], error["hint"]
        lines.setdefault(reason, []).append(row["line"])
        first.setdefault(reason, row["output"])
    return [FailedJobs(*reason, lines[reason], first[reason]) for reason in lines]


def _left(
    ledger: Ledger, running: Sequence[RunningJob], spent: Sequence[tuple[int, float]], each: float
) -> float | None:
    """Seconds until all is done, by the median of jobs of the same settings; None if none works."""
    workers = sum(job.alive for job in running)
    if not workers:
        return None
    usual: dict[int, list[float]] = {}
    for settings, seconds in spent:
        usual.setdefault(settings, []).append(seconds)
    work = sum(
        count * (median(usual[settings]) if settings in usual else each)
        for settings, count in ledger.waiting().items()
    )
    return (work + sum(max(0.0, each - job.seconds) for job in running)) / workers
