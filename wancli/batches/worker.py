"""A worker of a batch: a loaded model that takes jobs from a ledger."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
from time import monotonic, sleep
from typing import Any

from wancli.api.model import Model
from wancli.api.requests import Listener
from wancli.batches.adapt import less_memory
from wancli.batches.jobs import (
    LOADED_WITH,
    adapted,
    for_a_job,
    job_layers,
    loaded_with,
    plan_job,
    with_files,
)
from wancli.cost.capacity import in_words
from wancli.errors import (
    CapacityError,
    InputError,
    RunError,
    WancliError,
    Warn,
    is_disk_full,
    is_unexpected,
    unexpected,
    warn_once,
)
from wancli.planning.existing import record_of
from wancli.records.ledger import ClaimedJob, Ledger, died_error
from wancli.records.ledger_worker import JobCancelled, LedgerWorker
from wancli.records.naming import literal
from wancli.records.progress import Event, Report, ignore
from wancli.rollouts.store import RolloutStore
from wancli.utils.garbage import release_locals

BEAT_S = 5.0  # seconds between notes in the ledger that a job goes on
_AHEAD = 16  # prompts that are encoded with one
_WAIT = 1.0  # seconds between looks at the jobs of others
Started = Callable[[ClaimedJob], object]
Beat = Callable[[], object]
Ahead = Callable[[ClaimedJob], Sequence[str]]


@dataclass(frozen=True)
class JobOutcome:
    """A job that has ended: its record, or the error that it failed with.

    Where its model cannot be loaded, `others` that need the same one have failed with it. `again`
    says how a job that failed is tried again, in words; `change` has settings that need less
    memory, for one that ran out of it.
    """

    job: ClaimedJob
    record: Mapping[str, Any] | None = None
    error: WancliError | None = None
    kept: bool = False
    loaded: bool = True
    change: Mapping[str, Any] = field(default_factory=dict)
    others: int = 0
    again: str = ""

    @property
    def status(self) -> str:
        """`ok`, `skipped`, `cancelled`, `failed` or, if it is tried again, `again`."""
        if self.again:
            return "again"
        if self.error:
            return "cancelled" if isinstance(self.error, JobCancelled) else "failed"
        return "skipped" if self.kept else "ok"


class BatchWorker:
    """A loaded model that takes jobs from a ledger, and loads another where they need one."""

    def __init__(  # noqa: PLR0913 - how jobs are made, and who is told
        self, ledger: Ledger, *, skip_existing: bool = False, report: Report = ignore,
        started: Started = lambda job: None, warn: Warn | None = None, retries: int = 0,
        adapt: bool = False, timeout: float | None = None,
    ) -> None:  # fmt: skip
        """`started` is called with each job. Errors and warnings name settings in backticks.

        A job that runs out of memory, or fails unexpectedly, is tried again up to `retries` times;
        with `adapt`, one that runs out of memory with settings that need less. `timeout` is in
        seconds of a job, without loading.
        """
        self._ledger, self._started, self._retries = ledger, started, retries
        self._maker = JobMaker(
            skip_existing=skip_existing, adapt=adapt, timeout=timeout, report=report, warn=warn,
            ahead=partial(ledger.next_prompts, most=_AHEAD),
        )  # fmt: skip

    def run(self) -> Generator[JobOutcome, None, None]:
        """Make jobs until none is left, waiting for those of others, who may die.

        What runs when the iterator is closed is given back.
        """
        worker = LedgerWorker(self._ledger)
        try:
            while True:
                for failed in self._ledger.free_abandoned():
                    yield JobOutcome(failed, error=died_error())
                if job := worker.claim():
                    self._started(job)
                    outcome = self._maker.attempt(job, partial(worker.beat, job))
                    yield note_outcome(worker, outcome, retries=self._retries)
                elif self._ledger.is_running():
                    self._maker.close()  # its memory may be what the others need
                    sleep(_WAIT)
                else:
                    return
        finally:
            worker.close()
            self._maker.close()


def note_outcome(worker: LedgerWorker, outcome: JobOutcome, *, retries: int) -> JobOutcome:
    """Note in the ledger how a job has ended, and what follows from that.

    Raises OutputError where the disk is full, as it would be for the next jobs.
    """
    job, error = outcome.job, outcome.error
    if error is None:
        try:
            worker.done(job, outcome.record or {}, kept=outcome.kept)
            return outcome
        except WancliError as failure:
            error = failure
    if is_disk_full(error):
        raise error
    if isinstance(error, JobCancelled):
        worker.stopped(job)
        return JobOutcome(job, error=error)
    if again := _again(worker, outcome, error, retries):
        return JobOutcome(job, error=error, again=again)
    if not outcome.loaded:
        return replace(outcome, others=worker.failed_to_load(job, error))
    worker.failed(job, error)
    return JobOutcome(job, error=error)


def _again(worker: LedgerWorker, outcome: JobOutcome, error: WancliError, retries: int) -> str:
    """How a job that failed is tried again, in words; "" if it is not."""
    job, change = outcome.job, outcome.change
    if change and worker.adapt(job, adapted(job.values, change), same_model=_on_one_model):
        if job.command == "rollout":  # its chunks were made otherwise
            RolloutStore(job.output.with_suffix(".rollout")).set_aside(0)
        return f"it goes on with {in_words(change)}"
    may_pass = isinstance(error, CapacityError) or is_unexpected(error)
    return "it is tried again" if may_pass and worker.again(job, most=retries) else ""


class JobMaker:
    """A loaded model that makes jobs, and loads another where they need one."""

    def __init__(
        self, *, skip_existing: bool = False, adapt: bool = False, timeout: float | None = None,
        report: Report = ignore, warn: Warn | None = None, ahead: Ahead = lambda job: (),
    ) -> None:  # fmt: skip
        """`ahead` has the prompts of the next jobs, which may be encoded with one."""
        self._ahead = ahead
        self._skip, self._adapt, self._timeout = skip_existing, adapt, timeout
        self._report, self._warn = report, warn_once(warn) if warn else None
        self._model: Model | None = None
        self._number = -1

    def attempt(self, job: ClaimedJob, beat: Beat) -> JobOutcome:
        """Make a job, or say why not. What `beat` raises, which is called now and then, ends it."""
        try:
            record, kept = self.make(job, beat)
        except _NotLoaded as failure:
            release_locals(failure)
            return self._failed(job, failure.error, loaded=False)
        except Exception as failure:  # noqa: BLE001 - it does not end the batch
            release_locals(failure)  # its tensors, and the model, before the next job needs memory
            error = failure if isinstance(failure, WancliError) else unexpected(failure)
            if error is not failure:
                self.close()  # nobody knows what state it is in
            return self._failed(job, error)
        return JobOutcome(job, record=record, kept=kept)

    def _failed(self, job: ClaimedJob, error: WancliError, *, loaded: bool = True) -> JobOutcome:
        adapts = self._adapt and isinstance(error, CapacityError)
        change = less_memory(job.command, job.prompt, job.values) if adapts else {}
        return JobOutcome(job, error=for_a_job(error), loaded=loaded, change=change)

    def make(self, job: ClaimedJob, beat: Beat) -> tuple[Mapping[str, Any], bool]:
        """The record of a finished video, and whether it was there before."""
        listener = _JobListener(beat, self._report, self._warn)
        try:
            model = self._loaded(job, listener)
        except (JobCancelled, InputError):  # of this job alone: its image is gone, say
            raise
        except WancliError as error:
            raise _NotLoaded(error) from None
        except Exception as error:  # noqa: BLE001 - of all that need this model
            raise _NotLoaded(unexpected(error)) from None
        listener.limit(self._timeout)
        moves = model.pipeline.machine.offload == "model"  # the text encoder, for each prompt
        ahead = self._ahead(job) if moves else ()
        skip = self._skip or job.attempt > 1
        return _make_video(model, job, listener, skip=skip, ahead=ahead)

    def _loaded(self, job: ClaimedJob, listener: Listener) -> Model:
        """The model of a job, loaded for the job: that was checked to fit."""
        if self._model is None or self._number != job.model:
            self.close()
            planned = plan_job(job.command, job.prompt, job.values, listener)
            layers, _ = job_layers(loaded_with(job.values), listener)
            self._model, self._number = Model(planned, layers, listener), job.model
        return self._model

    def close(self) -> None:
        """Give the memory of the model back."""
        if self._model is not None:
            self._model.close()
            self._model = None


class JobTimeout(RunError):
    """A job took too long: it ended at its next step."""


class _NotLoaded(Exception):
    """The model of a job could not be loaded."""

    def __init__(self, error: WancliError) -> None:
        super().__init__(str(error))
        self.error = error


class _JobListener(Listener):
    """Notes now and then that a job goes on, passes on what is reported, and ends it in time."""

    def __init__(self, beat: Beat, report: Report, warn: Warn | None) -> None:
        super().__init__(self._on_event)
        self._beat, self._pass_on, self._warn = beat, report, warn
        self._last, self._end = monotonic(), inf
        self._seconds: float | None = None

    def limit(self, seconds: float | None) -> None:
        """Let the job end with JobTimeout after that many seconds from now."""
        self._seconds = seconds
        self._end = inf if seconds is None else monotonic() + seconds

    def _on_event(self, event: Event) -> None:
        now = monotonic()
        if now > self._end:
            raise JobTimeout(
                f"it took over {self._seconds:g} s.", hint="a longer `timeout`, or fewer `steps`"
            )
        if now - self._last > BEAT_S:
            self._beat()
            self._last = now
        self._pass_on(event)

    def warn(self, text: str, *, hint: str) -> None:
        """Pass a warning on."""
        if self._warn:
            self._warn(text, hint=hint)


def _on_one_model(values: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    return loaded_with(values) == loaded_with(others)


def _make_video(
    model: Model, job: ClaimedJob, listener: Listener, *, skip: bool, ahead: Sequence[str]
) -> tuple[Mapping[str, Any], bool]:
    """The record of a finished video, and whether it was there before.

    An earlier attempt may have ended between the video and its row: `skip` looks for it.
    """
    named = with_files(job.values, job.files)
    values = {name: value for name, value in named.items() if name not in LOADED_WITH}
    values["skip_existing"] = skip
    layers, _ = job_layers(loaded_with(job.values), listener)  # of its preset
    target: Any = {"seed": job.seed, "output": literal(job.output), "defaults": layers}
    if job.command == "rollout":
        session = model.plan_rollout(job.prompt, settings=values, **target)
        if session.kept:
            return record_of(job.output) or {}, True
        return session.run_whole(listener, model.pipeline), False
    values |= {name: job.values[name] for name in ("task",) if name in job.values}
    planned = model.plan_clip(job.prompt or "", settings=values, **target)
    for clip in planned.run(listener, model.pipeline, ahead=ahead):
        return clip.record.as_json(), False
    return record_of(job.output) or {}, True
