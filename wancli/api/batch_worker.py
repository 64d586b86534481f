"""A worker of a batch: a loaded model that takes jobs from a ledger."""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import partial
from time import monotonic, sleep
from typing import Any

from wancli.api.jobs import LOADED_WITH, plan_job
from wancli.api.model import Model
from wancli.api.requests import Listener, all_layers
from wancli.errors import WancliError, Warn, unexpected
from wancli.planning.existing import record_beside, record_in
from wancli.records.ledger import ClaimedJob, JobCancelled, Ledger, LedgerWorker, died_error
from wancli.records.progress import Event, Report, ignore

_BEAT = 5.0  # seconds
_WAIT = 1.0  # seconds between looks at the jobs of others
Started = Callable[[ClaimedJob], object]


@dataclass(frozen=True)
class JobOutcome:
    """A job that has ended: its record, or the error that it failed with.

    Where its model cannot be loaded, `others` that need the same one have failed with it.
    """

    job: ClaimedJob
    record: Mapping[str, Any] | None = None
    error: WancliError | None = None
    kept: bool = False
    others: int = 0

    @property
    def status(self) -> str:
        """`ok`, `skipped`, `cancelled` or `failed`."""
        if self.error:
            return "cancelled" if isinstance(self.error, JobCancelled) else "failed"
        return "skipped" if self.kept else "ok"


class BatchWorker:
    """A loaded model that takes jobs from a ledger, and loads another where they need one."""

    def __init__(
        self, ledger: Ledger, *, skip_existing: bool = False, report: Report = ignore,
        started: Started = lambda job: None, warn: Warn | None = None,
    ) -> None:  # fmt: skip
        """`started` is called with each job. Errors and warnings name settings in backticks."""
        self._ledger, self._report, self._started = ledger, report, started
        self._warn = _once(warn) if warn else None
        self._skip = skip_existing
        self._model: Model | None = None
        self._number = -1

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
                    yield self._outcome(worker, job)
                elif self._ledger.is_running():
                    self._close()  # its memory may be what the others need
                    sleep(_WAIT)
                else:
                    return
        finally:
            worker.close()
            self._close()

    def _outcome(self, worker: LedgerWorker, job: ClaimedJob) -> JobOutcome:
        try:
            record, kept = self._make(worker, job)
            worker.done(job, record, kept=kept)
        except JobCancelled as failure:
            return JobOutcome(job, error=failure)
        except _NotLoaded as failure:
            others = worker.failed_to_load(job, failure.error)
            return JobOutcome(job, error=failure.error, others=others)
        except Exception as failure:  # noqa: BLE001 - it does not end the batch
            error = failure if isinstance(failure, WancliError) else unexpected(failure)
            worker.failed(job, error)
            if error is not failure:
                self._close()  # nobody knows what state it is in
            return JobOutcome(job, error=error)
        return JobOutcome(job, record=record, kept=kept)

    def _make(self, worker: LedgerWorker, job: ClaimedJob) -> tuple[Mapping[str, Any], bool]:
        """The record of a finished video, and whether it was there before."""
        listener = _JobListener(worker, job, self._report, self._warn)
        try:
            model = self._loaded(job, listener)
        except JobCancelled:
            raise
        except WancliError as error:
            raise _NotLoaded(error) from None
        except Exception as error:  # noqa: BLE001 - likewise of all that need this model
            raise _NotLoaded(unexpected(error)) from None
        return _make_video(model, job, listener, skip=self._skip or job.attempt > 1)

    def _loaded(self, job: ClaimedJob, listener: Listener) -> Model:
        """The model of a job, loaded for the job: that was checked to fit."""
        if self._model is None or self._number != job.model:
            self._close()
            loaded = {name: v for name, v in job.values.items() if name in LOADED_WITH}
            planned = plan_job(job.command, job.prompt, job.values, listener)
            layers, _ = all_layers(loaded, listener)
            self._model, self._number = Model(planned, layers, listener), job.model
        return self._model

    def _close(self) -> None:
        if self._model is not None:
            self._model.close()
            self._model = None


class _NotLoaded(Exception):
    """The model of a job could not be loaded."""

    def __init__(self, error: WancliError) -> None:
        super().__init__(str(error))
        self.error = error


class _JobListener(Listener):
    """Notes in the ledger, now and then, that a job goes on, and passes on what is reported."""

    def __init__(
        self, worker: LedgerWorker, job: ClaimedJob, report: Report, warn: Warn | None
    ) -> None:
        super().__init__(self._on_event)
        self._beat = partial(worker.beat, job)
        self._pass_on, self._warn, self._last = report, warn, monotonic()

    def _on_event(self, event: Event) -> None:
        if monotonic() - self._last > _BEAT:
            self._beat()
            self._last = monotonic()
        self._pass_on(event)

    def warn(self, text: str, *, hint: str) -> None:
        """Pass a warning on."""
        if self._warn:
            self._warn(text, hint=hint)


def _once(warn: Warn) -> Warn:
    """A callback that passes each warning on once: jobs are alike."""
    seen: set[str] = set()

    def new(text: str, *, hint: str) -> None:
        if text not in seen:
            seen.add(text)
            warn(text, hint=hint)

    return new


def _make_video(
    model: Model, job: ClaimedJob, listener: Listener, *, skip: bool
) -> tuple[Mapping[str, Any], bool]:
    """The record of a finished video, and whether it was there before.

    An earlier attempt may have ended between the video and its row: `skip` looks for it.
    """
    values = {name: v for name, v in job.values.items() if name not in LOADED_WITH}
    target: Any = {"seed": job.seed, "output": job.output}
    if job.command == "rollout":
        values["resume"] = skip and job.output.with_suffix(".rollout").exists()
        session = model.plan_rollout(job.prompt, settings=values, **target)
        run = session.run(listener, model.pipeline)
        while True:
            try:
                next(run)
            except StopIteration as end:
                return end.value.as_json(), False
    values["skip_existing"] = skip
    planned = model.plan_clip(job.prompt or "", settings=values, **target)
    for clip in planned.run(listener, model.pipeline):
        return clip.record.as_json(), False
    return record_in(job.output) or record_beside(job.output) or {}, True
