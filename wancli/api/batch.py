"""Batches: jobs that are checked and named before anything loads."""

import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wancli.api.keywords import GenerateKeywords, RolloutKeywords
from wancli.api.requests import Listener, all_layers, clip_request, rollout_request
from wancli.config.keywords import MachineSettings
from wancli.config.seeds import parse_seeds
from wancli.cost.estimate import Estimate
from wancli.errors import UsageError, WancliError
from wancli.generation.batch import OutputFiles, PlannedVideos, plan_videos
from wancli.planning.jobs import BatchFile, BatchJob, JobSettings, at_line
from wancli.planning.listed_steps import step_count
from wancli.planning.offload import OFFLOADS
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
    checked = []
    for number, shared in enumerate(batch.settings):
        try:
            checked.append(_check(shared, firsts[number], listener))
        except WancliError as error:
            raise at_line(batch.origin, shared.line, error) from None
    settings = _grouped(batch.settings, checked)
    jobs = list(_named(batch, [one.fields for one in checked], folder.absolute()))
    seconds = [one.seconds for one in checked]
    known = None not in seconds
    total = sum(seconds[job.settings] or 0 for job in jobs) if known else None
    return PlannedBatch(batch, settings, jobs, total)


@dataclass(frozen=True)
class _Checked:
    """Settings that are valid: the fields of their videos' names, and what one of them needs."""

    fields: Mapping[str, Any]
    estimate: Estimate | None
    auto: bool  # whether the mode of offload is the plan's to choose

    @property
    def seconds(self) -> float | None:
        return self.estimate.total_s if self.estimate else None


def _check(shared: JobSettings, job: BatchJob, listener: Listener) -> _Checked:
    """Check one job of those that share settings. Raises WancliError."""
    planned = plan_job(shared.command, job.prompt, shared.values, listener)
    planned.capacity.check()
    settings = planned.resolved.settings
    steps = step_count(settings.sampling)
    fields = name_fields(settings, prompt="", seed=0, steps=steps)
    return _Checked(fields, planned.capacity.estimate, settings.machine.offload == "auto")


def plan_job(
    command: str, prompt: str | None, values: Mapping[str, Any], listener: Listener
) -> PlannedVideos | RolloutSession:
    """Plan a job by itself, without its files. Raises WancliError."""
    layers, options = all_layers(values, listener)
    if command == "rollout":
        request = rollout_request(prompt, options, seed=0, output="x.mp4")
        return RolloutSession(request, layers, before={})
    clip = clip_request(prompt or "", layers, options, seed=0)
    return plan_videos(clip, OutputFiles(None, Path(), video=False))


def _grouped(settings: Sequence[JobSettings], checked: Sequence[_Checked]) -> list[LedgerSettings]:
    """The settings with the number of the model that they run on.

    A model is loaded once, so `offload auto` is for its most demanding video; only settings that do
    not work in that mode load the model again, in their own.
    """
    modes = list(OFFLOADS)
    groups: dict[str, list[int]] = {}
    for number, shared in enumerate(settings):
        groups.setdefault(_loaded_with(shared.values), []).append(number)
    values = [shared.values for shared in settings]
    for members in groups.values():
        autos = {n: checked[n].estimate for n in members if checked[n].auto}
        estimates = {n: estimate for n, estimate in autos.items() if estimate}
        most = max((e.offload for e in estimates.values()), key=modes.index, default="")
        for number, estimate in estimates.items():
            mode = most if most in estimate.possible else estimate.offload
            values[number] = {**values[number], "offload": mode}
    models: dict[str, int] = {}
    numbers = [models.setdefault(_loaded_with(one), len(models)) for one in values]
    return [
        LedgerSettings(model, shared.command, one)
        for model, shared, one in zip(numbers, settings, values, strict=True)
    ]


def _loaded_with(values: Mapping[str, Any]) -> str:
    """Equal for settings that run on one loaded model."""
    return repr(sorted((name, v) for name, v in values.items() if name in LOADED_WITH))


def _named(
    batch: BatchFile, fields: Sequence[Mapping[str, Any]], folder: Path
) -> Iterator[LedgerJob]:
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
