"""Batches: jobs that are checked and named before anything loads."""

import os
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wancli.api.keywords import GenerateKeywords, RolloutKeywords
from wancli.api.requests import Listener, all_layers, clip_request, rollout_request
from wancli.config.keywords import MachineSettings
from wancli.config.resolve import resolve
from wancli.config.seeds import parse_seeds
from wancli.config.settings import RolloutSettings, Settings
from wancli.errors import UsageError, WancliError
from wancli.generation.batch import OutputFiles, plan_videos
from wancli.planning.jobs import BatchFile, BatchJob, JobSettings, at_line
from wancli.planning.listed_steps import step_count
from wancli.records.ledger import LedgerJob, LedgerSettings
from wancli.records.naming import name_fields, name_output
from wancli.rollouts.session import RolloutSession

# The batch itself says whether and where a job is done.
_NOT_IN_A_BATCH = {"resume", "rerender", "skip_existing", "preview_every"}
JOB_KEYS = {
    "generate": {*GenerateKeywords.__optional_keys__, "model"} - _NOT_IN_A_BATCH,
    "rollout": {*RolloutKeywords.__optional_keys__, "model"} - _NOT_IN_A_BATCH,
}
# What a model is loaded with.
LOADED_WITH = {*MachineSettings.__optional_keys__, "model", "preset", "cachedit_preset", "task"}


@dataclass(frozen=True)
class PlannedBatch:
    """Jobs that are valid and named, with the settings that they share."""

    batch: BatchFile
    settings: list[LedgerSettings]
    jobs: list[LedgerJob]
    seconds: float | None  # None where the device was not measured


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
