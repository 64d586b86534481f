"""Making the jobs of a batch, on one worker or several, with one display for all of them."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from wancli.cli.progress import Clock, Progress, RunProgress, clock_time
from wancli.errors import BatchError, UsageError, WancliError, warn_once
from wancli.records.progress import Event
from wancli.utils.interrupts import second_ends_at_once
from wancli.utils.units import is_count

if TYPE_CHECKING:
    from wancli.batches.worker import JobOutcome
    from wancli.batches.worker_process import Message
    from wancli.batches.workers import WorkerPlace
    from wancli.cli.screen import Screen
    from wancli.records.batch_status import BatchStatus
    from wancli.records.ledger import Ledger

AUTO, LOCAL, RAY = "auto", "local", "ray"
_READ_EVERY_S = 2.0  # seconds between looks at the ledger, at least


class WorkerProgress:
    """What one worker is doing."""

    def __init__(self, name: str, clock: Clock = monotonic) -> None:
        self.name, self._clock = name, clock
        self.job = ""
        self.run: RunProgress | None = None  # None while there is no job

    def start(self, job: str) -> None:
        """Begin a job."""
        self.job, self.run = job, RunProgress(self._clock)

    def end(self) -> None:
        """End the job."""
        self.run = None

    @property
    def fraction(self) -> float | None:
        """How much of the phase is done."""
        return self.run.fraction if self.run else None

    def text(self) -> str:
        """`circle-1.mp4 denoise step 12/30 40% 812 ms/step eta 0:14`."""
        return f"{self.job} {self.run.name} {self.run.text()}" if self.run else "waits"

    def short_text(self) -> str:
        """`gpu 0: denoise step 12/30`."""
        doing = " ".join([self.run.name, *self.run.text().split()[:2]]) if self.run else "waits"
        return f"{self.name}: {doing}"


class BatchProgress:
    """How far a batch is, of all that work on it, and what each worker of this run is doing."""

    name = "batch"

    def __init__(
        self, read: Callable[[], "BatchStatus"], names: Sequence[str], clock: Clock = monotonic
    ) -> None:
        """`names` are those of the workers; `read` is called now and then as jobs end."""
        self.workers = [WorkerProgress(name, clock) for name in names]
        self._read, self._clock = read, clock
        self._status, self._at = read(), clock()

    def __iter__(self) -> Iterator[Progress]:
        """All that is shown: each worker, and the batch."""
        return iter([*self.workers, self])

    def start(self, number: int, job: str) -> None:
        """Note that a worker begins a job."""
        self._worker(number).start(job)

    def handle(self, number: int, event: Event) -> None:
        """Note what a worker reports about its job."""
        if run := self._worker(number).run:
            run.handle(event)

    def _worker(self, number: int) -> WorkerProgress:
        """A worker; how many actors a cluster has is known as they begin."""
        while number >= len(self.workers):
            self.workers.append(WorkerProgress(f"worker {len(self.workers)}", self._clock))
        return self.workers[number]

    def end(self, number: int) -> None:
        """Note that its job has ended."""
        self._worker(number).end()
        if self._clock() - self._at > _READ_EVERY_S or not any(w.run for w in self.workers):
            self._status, self._at = self._read(), self._clock()

    @property
    def fraction(self) -> float:
        """How much is done, of all jobs."""
        total = sum(self._status.counts.values())
        return 1 - self._left / total if total else 1.0

    @property
    def _left(self) -> int:
        return self._status.counts["pending"] + self._status.counts["running"]

    def text(self) -> str:
        """`12 of 100 done, 1 failed, eta 1:02:03`."""
        counts = self._status.counts
        failed, total = counts["failed"], sum(counts.values())
        parts = [f"{counts['done'] + counts['skipped']:,} of {total:,} done"]
        parts += [f"{failed:,} failed"] if failed else []
        if (left := self._status.left_s) is not None:
            parts.append(f"eta {clock_time(left - (self._clock() - self._at))}")
        return ", ".join(parts)


class BatchLine:
    """All of a batch's progress on one line, where there is no terminal."""

    name = "batch"

    def __init__(self, batch: BatchProgress) -> None:
        self._batch = batch

    @property
    def fraction(self) -> float:
        """How much is done, of all jobs."""
        return self._batch.fraction

    def text(self) -> str:
        """`12 of 100 done, eta 1:02:03; gpu 0: denoise step 3/30; gpu 1: write`."""
        return "; ".join([self._batch.text(), *(w.short_text() for w in self._batch.workers)])


@dataclass(frozen=True)
class HowToWork:
    """How the jobs of a batch are made. Without places, this process makes them."""

    places: Sequence["WorkerPlace"]
    options: Mapping[str, Any]  # keyword arguments of BatchWorker
    most_failures: int | None = None


def make_batch(ledger: "Ledger", how: HowToWork, screen: "Screen") -> None:
    """Make what is left of a batch, and failed jobs again; closes the ledger.

    Raises BatchError if jobs have failed, for the exit code.
    """
    from wancli.cli.batch_ledger import in_words
    from wancli.records.ledger_file import batch_command

    with ledger:
        ledger.retry(ledger.numbers("failed"))  # of an earlier run
        make_jobs(ledger, how, screen)
        counts = ledger.counts()
    screen.note(in_words(counts))
    if failed := counts["failed"]:
        message = f"{failed:,} of {sum(counts.values()):,} jobs failed."
        hint = f"{batch_command('status', ledger.path)}; the same command tries again"
        raise BatchError(message, hint=hint)


def make_jobs(ledger: "Ledger", how: HowToWork, screen: "Screen") -> None:
    """Make the jobs of a ledger, and print each as it ends."""
    from wancli.records.batch_status import read_status

    names = [place.name for place in how.places if place.name != RAY] or ["worker 0"]
    progress = BatchProgress(lambda: read_status(ledger), names)
    failures = 0
    run, stop = _workers(ledger, how, partial(_handle, progress, warn_once(screen.warn)))
    second_ends_at_once()
    with screen.batch_progress(progress), closing(run):
        for outcome in run:
            print_outcome(outcome, screen)
            failures += 1 + outcome.others if outcome.status == "failed" else 0
            if how.most_failures is not None and failures >= how.most_failures:
                stop()


def _workers(ledger: "Ledger", how: HowToWork, handle: Callable[[int, "Message"], None]) -> Any:
    """The outcomes of all workers, and a function that lets them give back what runs."""
    from wancli.batches.worker import BatchWorker
    from wancli.batches.worker_process import JobStarted, WorkerWarning
    from wancli.batches.workers import WorkerPool
    from wancli.utils.heap import keep_heap

    if how.places:
        pool = WorkerPool(ledger, how.places, how.options, on_message=handle)
        return pool.run(), pool.stop
    keep_heap()
    worker = BatchWorker(
        ledger, **how.options, report=partial(handle, 0),
        started=lambda job: handle(0, JobStarted(job)),
        warn=lambda text, *, hint: handle(0, WorkerWarning(text, hint)),
    )  # fmt: skip
    outcomes = _handed_on(worker.run(), handle)
    return outcomes, outcomes.close


def _handed_on(outcomes: Any, handle: Callable[[int, "Message"], None]) -> Any:
    """Outcomes, each noted before it is yielded."""
    with closing(outcomes):
        for outcome in outcomes:
            handle(0, outcome)
            yield outcome


def _handle(
    progress: BatchProgress, warn: Callable[..., None], number: int, message: "Message"
) -> None:
    """Take note of what a worker says."""
    from wancli.batches.worker import JobOutcome
    from wancli.batches.worker_process import ActorMessage, JobStarted, WorkerFailed, WorkerWarning

    if isinstance(message, JobStarted):
        progress.start(number, message.job.output.name)
    elif isinstance(message, JobOutcome):
        progress.end(number)
    elif isinstance(message, WorkerWarning):
        warn(message.text, hint=message.hint)
    elif not isinstance(message, WorkerFailed | ActorMessage):
        progress.handle(number, message)


def print_outcome(outcome: "JobOutcome", screen: "Screen") -> None:
    """Print a job that has ended: its path, or its record with --json."""
    job, error = outcome.job, outcome.error
    if error:
        if os.environ.get("WANCLI_DEBUG") == "1":
            raise error
        others = f" and {outcome.others:,} that need the same model" if outcome.others else ""
        end = f" {outcome.again}." if outcome.again else ""
        screen.warn(f"{job.output.name}{others}: {error}{end}", hint=error.hint)
    if not outcome.again and (screen.options.json or not error):
        screen.answer(str(job.output), {"job": job.number, **_json(outcome)})


def _json(outcome: "JobOutcome") -> dict[str, Any]:
    from wancli.records.record import error_json

    error: WancliError | None = outcome.error
    if error:
        path = {"path": str(outcome.job.output)}
        others = {"others": outcome.others} if outcome.others else {}
        return {"status": outcome.status, "error": error_json(error), "output": path, **others}
    return {**(outcome.record or {}), "status": outcome.status}


def choose_workers(
    workers: str | None, devices: str | None, *, engine: str, address: str | None
) -> tuple[list["WorkerPlace"], dict[str, Any]]:
    """Places of worker processes, none for this process alone, and more keyword arguments for each.

    Raises UsageError, SetupError.
    """
    from wancli.batches.workers import ray_place, worker_places

    if engine not in (LOCAL, RAY):
        raise UsageError(f"there is no `engine {engine}`.", hint=f"`engine {LOCAL}` or {RAY}")
    count, numbers = parse_workers(workers, devices)
    if engine == RAY:
        if devices is not None:
            raise UsageError("Ray places actors on GPUs itself.", hint="drop `devices`")
        return [ray_place()], {"address": address, "workers": count}
    if address is not None:
        raise UsageError("`address` is that of a Ray cluster.", hint=f"`engine {RAY}`")
    alone = workers is None and devices is None
    return ([] if alone else worker_places(count, numbers)), {}


def parse_workers(workers: str | None, devices: str | None) -> tuple[int | None, list[int]]:
    """The number of workers, None for `auto`, and numbers of GPUs. Raises UsageError."""
    numbers = [number.strip() for number in devices.split(",")] if devices is not None else []
    if not all(map(is_count, numbers)):
        raise UsageError(f"`devices {devices}` is no list of GPUs.", hint="`devices 0,2`")
    count = None if workers in (None, AUTO) else _count(workers or "")
    return count, [int(number) for number in numbers]


def _count(workers: str) -> int:
    if not is_count(workers) or not 1 <= int(workers) <= 1024:
        raise UsageError(f"`workers {workers}` is no number of workers.", hint="`workers auto`")
    return int(workers)
