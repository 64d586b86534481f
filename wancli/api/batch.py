"""Batches: jobs that are planned and named before anything loads, and a worker that makes them."""

import os
import unicodedata
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from wancli.api import load
from wancli.api.keywords import GenerateKeywords, RolloutKeywords
from wancli.api.model import Model
from wancli.api.requests import Listener, all_layers, clip_request, rollout_request
from wancli.config.keywords import MachineSettings
from wancli.config.resolve import resolve
from wancli.config.seeds import parse_seeds
from wancli.config.settings import RolloutSettings, Settings
from wancli.errors import UsageError, WancliError
from wancli.generation.batch import OutputFiles, plan_videos
from wancli.planning.jobs import BatchFile, BatchJob, JobSettings, at_line
from wancli.planning.listed_steps import step_count
from wancli.records.ledger import ClaimedJob, Ledger, LedgerJob, LedgerSettings, LedgerWorker
from wancli.records.naming import name_fields, name_output
from wancli.records.progress import Event, Report, ignore
from wancli.rollouts.session import RolloutSession

# The batch itself says whether and where a job is done.
_NOT_IN_A_BATCH = {"resume", "rerender", "skip_existing", "preview_every"}
JOB_KEYS = {
    "generate": {*GenerateKeywords.__optional_keys__, "model"} - _NOT_IN_A_BATCH,
    "rollout": {*RolloutKeywords.__optional_keys__, "model"} - _NOT_IN_A_BATCH,
}
# What a model is loaded with.
LOADED_WITH = {*MachineSettings.__optional_keys__, "model", "preset", "cachedit_preset", "task"}
_BEAT = 5.0  # seconds


@dataclass(frozen=True)
class PlannedBatch:
    """Jobs that are valid and named, with the settings that they share."""

    batch: BatchFile
    settings: list[LedgerSettings]
    jobs: list[LedgerJob]
    seconds: float | None  # None where the device was not measured


@dataclass(frozen=True)
class JobOutcome:
    """A job that has ended: its record, or the error that it failed with."""

    job: ClaimedJob
    record: Mapping[str, Any] | None = None
    error: WancliError | None = None
    kept: bool = False


def plan_batch(batch: BatchFile, folder: Path, listener: Listener) -> PlannedBatch:
    """Check every job and name its video. Raises WancliError with the line of the first wrong one.

    Settings are validated and planned once for all jobs that share them.
    """
    firsts: dict[int, BatchJob] = {}
    for job in batch.jobs:
        firsts.setdefault(job.settings, job)
    models: dict[str, int] = {}
    settings, fields, seconds = [], [], []
    for number, shared in enumerate(batch.settings):
        try:
            names, estimate = _plan(shared, firsts[number], listener)
        except WancliError as error:
            raise at_line(batch.origin, shared.line, error) from None
        loaded = {name: v for name, v in shared.values.items() if name in LOADED_WITH}
        model = models.setdefault(repr(sorted(loaded.items())), len(models))
        settings.append(LedgerSettings(model, shared.command, shared.values))
        fields.append(names)
        seconds.append(estimate)
    jobs = list(_named(batch, fields, folder.absolute()))
    known = [s for s in seconds if s is not None]
    total = sum(seconds[j.settings] or 0 for j in jobs) if len(known) == len(seconds) else None
    return PlannedBatch(batch, settings, jobs, total)


def _plan(
    shared: JobSettings, job: BatchJob, listener: Listener
) -> tuple[dict[str, Any], float | None]:
    """Check one job of those that share settings: the fields of its name, and its seconds."""
    layers, options = all_layers(shared.values, listener)
    prompt, rollout = job.prompt or "", shared.command == "rollout"
    resolved = resolve(layers, RolloutSettings if rollout else Settings)
    if rollout:
        request = rollout_request(job.prompt, options, seed=job.seed or 0, output="x.mp4")
        planned: Any = RolloutSession(request, layers, before={})
    else:
        clip = clip_request(prompt, layers, options, seed=job.seed or 0)
        planned = plan_videos(clip, OutputFiles(None, Path(), video=False))
    planned.capacity.check()
    steps = step_count(resolved.settings.sampling)
    estimate = planned.capacity.estimate
    fields = name_fields(resolved.settings, prompt=prompt, seed=0, steps=steps)
    return fields, estimate.total_s if estimate else None


def _named(batch: BatchFile, fields: list[dict[str, Any]], folder: Path) -> Iterator[LedgerJob]:
    """Jobs with seeds and final names. Raises UsageError for two of one name."""
    lines: dict[str, int] = {}
    for job in batch.jobs:
        seed = parse_seeds(None, None)[0] if job.seed is None else job.seed
        values = {**fields[job.settings], "prompt": job.prompt or "", "seed": seed}
        path = folder / name_output(job.output, values, folder=folder, several=False)
        text = str(path)
        key = unicodedata.normalize("NFC", text).casefold()  # one file on some disks
        if key in lines:
            message = f"{path} is the output of line {lines[key]}, too."
            hint = "put what differs into the name: {prompt:40}-{steps}-{seed}.mp4"
            raise at_line(batch.origin, job.line, UsageError(message, hint=hint))
        lines[key] = job.line
        yield LedgerJob(job.line, job.settings, job.prompt, seed, text, job.id)


def check_new(planned: PlannedBatch) -> None:
    """Raise UsageError for a job whose video exists before the batch has begun.

    A job of `overwrite` replaces it.
    """
    there: dict[str, set[str]] = {}
    for job in planned.jobs:
        place, _, name = job.output.rpartition(os.sep)
        if place not in there:
            there[place] = {found.name for found in Path(place).glob("*")}
        if name in there[place] and not planned.settings[job.settings].values.get("overwrite"):
            error = UsageError(f"{job.output} exists.", hint="`skip_existing`, or another `output`")
            raise at_line(planned.batch.origin, job.line, error)


class BatchWorker:
    """A loaded model that takes jobs from a ledger, and loads another where they need one."""

    def __init__(
        self, ledger: Ledger, *, skip_existing: bool = False, report: Report = ignore
    ) -> None:
        self._ledger, self._report = ledger, report
        self._skip = skip_existing
        self._model: Model | None = None
        self._number = -1

    def run(self) -> Generator[JobOutcome, None, None]:
        """Make jobs until none waits. What runs when the iterator is closed is given back."""
        worker = LedgerWorker(self._ledger)
        try:
            while True:
                self._ledger.free_abandoned()
                job = worker.claim()
                if job is None:
                    return
                yield self._outcome(worker, job)
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
