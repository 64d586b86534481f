"""A worker of a batch: a loaded model that takes jobs from a ledger."""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any

from wancli.api import load
from wancli.api.batch import LOADED_WITH
from wancli.api.model import Model
from wancli.errors import WancliError
from wancli.records.ledger import ClaimedJob, Ledger, LedgerWorker, died_error
from wancli.records.progress import Event, Report, ignore

_BEAT = 5.0  # seconds
_WAIT = 1.0  # seconds between looks at the jobs of others
Started = Callable[[ClaimedJob], object]


@dataclass(frozen=True)
class JobOutcome:
    """A job that has ended: its record, or the error that it failed with."""

    job: ClaimedJob
    record: Mapping[str, Any] | None = None
    error: WancliError | None = None
    kept: bool = False


class BatchWorker:
    """A loaded model that takes jobs from a ledger, and loads another where they need one."""

    def __init__(
        self, ledger: Ledger, *, skip_existing: bool = False, report: Report = ignore,
        started: Started = lambda job: None,
    ) -> None:  # fmt: skip
        self._ledger, self._report, self._started = ledger, report, started
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
        except WancliError as error:
            worker.failed(job, error)
            return JobOutcome(job, error=error)
        return JobOutcome(job, record=record, kept=kept)

    def _make(self, worker: LedgerWorker, job: ClaimedJob) -> tuple[Mapping[str, Any], bool]:
        """The record of a finished video, and whether it was there before."""
        values = {name: v for name, v in job.values.items() if name not in LOADED_WITH}
        model, report = self._loaded(job), _beating(worker, job, self._report)
        target: Any = {"seed": job.seed, "output": job.output, "progress": report}
        # An earlier attempt may have ended between the video and its row.
        skip = self._skip or job.attempt > 1
        if job.command == "rollout":
            again = skip and job.output.with_suffix(".rollout").exists()
            stream = model.rollout(job.prompt, **target, **values, resume=again)
            for _chunk in stream:
                pass
            return stream.record or {}, False
        video = model.generate(job.prompt or "", **target, **values, skip_existing=skip)
        return video.record, video.latents is None

    def _loaded(self, job: ClaimedJob) -> Model:
        if self._model is None or self._number != job.model:
            self._close()
            settings: Any = {n: v for n, v in job.values.items() if n in LOADED_WITH}
            self._model, self._number = load(**settings, progress=self._report), job.model
        return self._model

    def _close(self) -> None:
        if self._model is not None:
            self._model.close()
            self._model = None


def _beating(worker: LedgerWorker, job: ClaimedJob, report: Report) -> Report:
    """A callback that also notes in the ledger, now and then, that the job goes on."""
    last = monotonic()

    def on_event(event: Event) -> None:
        nonlocal last
        if monotonic() - last > _BEAT:
            worker.beat(job)
            last = monotonic()
        report(event)

    return on_event
