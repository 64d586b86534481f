"""Batches: jobs that are checked and named before anything loads."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from wancli.api.requests import Listener
from wancli.batches.jobs import absolute_files, plan_job, typed
from wancli.batches.outputs import name_jobs
from wancli.batches.repro_jobs import with_records
from wancli.catalog.specs import ModelSpec
from wancli.catalog.vocabulary import prompt_warnings
from wancli.cost.devices import gpus_seen_once
from wancli.cost.estimate import Estimate
from wancli.errors import PlanWarning, WancliError
from wancli.planning.job_rows import about_defaults, at_lines
from wancli.planning.jobs import BatchFile, BatchJob, JobSettings, same_error
from wancli.planning.listed_steps import step_count
from wancli.planning.offload import OFFLOADS
from wancli.planning.shards import Shard
from wancli.records.ledger_file import LedgerJob, LedgerSettings
from wancli.records.naming import name_fields
from wancli.rollouts.session import RolloutSession


@dataclass(frozen=True)
class PlannedBatch:
    """Jobs that are valid and named, with the settings that they share."""

    batch: BatchFile
    settings: list[LedgerSettings]
    jobs: Sequence[LedgerJob]
    each_s: Sequence[float | None]  # by settings; None where the device was not measured
    devices: Sequence[str]  # names of those that are planned for
    checked: Sequence["_Checked"]  # by settings

    @property
    def seconds(self) -> float | None:
        """Seconds of all jobs on one worker; None if any is not known."""
        known = [self.each_s[job.settings] for job in self.jobs]
        return None if None in known else sum(one or 0.0 for one in known)

    @property
    def warnings(self) -> Sequence[PlanWarning]:
        """Each warning once: about the prompts of all jobs by model, and about settings."""
        prompts: dict[str, dict[str, None]] = {}
        for job in self.jobs:
            one = self.checked[job.settings]
            texts = dict.fromkeys((job.prompt or "", *one.later_prompts))
            prompts.setdefault(one.spec.name, {}).update(texts)
        specs = {one.spec.name: one.spec for one in self.checked}
        words = (prompt_warnings(specs[name], texts) for name, texts in prompts.items())
        about_settings = (one.about_settings for one in self.checked)
        return list(dict.fromkeys(chain(*words, *about_settings)))

    def shard(self, shard: Shard) -> "PlannedBatch":
        """One share of the jobs."""
        return replace(self, jobs=shard.of(self.jobs))

    def without(self, outputs: Collection[str]) -> "PlannedBatch":
        """The jobs of other outputs."""
        return replace(self, jobs=[job for job in self.jobs if job.output not in outputs])


def plan_batch(
    batch: BatchFile, folder: Path, listener: Listener, *, elsewhere: bool = False
) -> PlannedBatch:
    """Check every job and name its video. Raises WancliError with the line of the first wrong one.

    Settings are validated and planned once for all jobs that share them. Whether they fit is for
    the machines to say that make the videos, if these are `elsewhere`.
    """
    batch = with_records(batch, listener)
    firsts: dict[int, BatchJob] = {}
    for job in batch.jobs:
        first = firsts.setdefault(job.settings, job)
        if job.prompt is None and first.prompt is not None:  # which few jobs can be without
            firsts[job.settings] = job
    with gpus_seen_once():
        checked = _check_all(batch, firsts, listener, fits=not elsewhere)
    settings = _grouped(batch.settings, checked)
    jobs = list(name_jobs(batch, [one.fields for one in checked], folder))
    estimates = [one.estimate for one in checked]
    each = [estimate.total_s if estimate else None for estimate in estimates]
    devices = dict.fromkeys(estimate.device.name for estimate in estimates if estimate)
    return PlannedBatch(batch, settings, jobs, each, list(devices), checked)


@dataclass(frozen=True)
class _Checked:
    """Settings that are valid: the fields of their videos' names, and what one of them needs."""

    values: Mapping[str, Any]
    model: str  # equal for settings that run on one loaded model
    fields: Mapping[str, Any]
    estimate: Estimate | None
    auto: bool  # whether the mode of offload is the plan's to choose
    spec: ModelSpec
    about_settings: Sequence[PlanWarning] = ()
    later_prompts: Sequence[str] = ()  # of a rollout's later chunks


def _check_all(
    batch: BatchFile, firsts: Mapping[int, BatchJob], listener: Listener, *, fits: bool
) -> list[_Checked]:
    """Check a job of each settings. Raises WancliError with the lines of those that are wrong."""
    plans: dict[str, _Checked] = {}
    checked = []
    wrong: dict[int, WancliError] = {}
    for number, shared in enumerate(batch.settings):
        try:
            if (key := _plan_key(shared)) not in plans:
                plans[key] = _check(shared, firsts[number], listener, fits=fits)
            values = typed({**batch.environment, **shared.values})  # whoever makes it, and where
            checked.append(replace(plans[key], values=absolute_files(values)))
        except WancliError as error:
            plain = replace(firsts[number], prompt="a prompt")
            defaults = replace(shared, values=batch.defaults_in(shared.values))
            alone = partial(_check, defaults, plain, listener, fits=fits)
            if not wrong and defaults.values and same_error(error, alone):
                raise about_defaults(batch.origin, batch.defaults, error) from None
            wrong.setdefault(firsts[number].line, error)
    if wrong:
        raise at_lines(batch.origin, wrong)
    return checked


def _check(shared: JobSettings, job: BatchJob, listener: Listener, *, fits: bool) -> _Checked:
    """Check one job of those that share settings, with `fits` that it fits. Raises WancliError."""
    planned = plan_job(shared.command, job.prompt, typed(shared.values), listener)
    if fits:
        planned.capacity.check()
    settings = planned.resolved.settings
    steps = step_count(settings.sampling)
    fields = name_fields(settings, prompt="", seed=0, steps=steps)
    auto = fits and settings.machine.offload == "auto"  # elsewhere it is for that machine
    model = repr((settings.model, settings.machine))
    estimate, about = planned.capacity.estimate, [w for w in planned.warnings if not w.of_prompt]
    later = planned.schedule.prompts[1:] if isinstance(planned, RolloutSession) else ()
    return _Checked(shared.values, model, fields, estimate, auto, planned.spec, about, later)


def _plan_key(shared: JobSettings) -> str:
    """Equal for settings that are planned alike: the words of a text change nothing."""
    values = dict(shared.values)
    if isinstance(text := values.get("negative_prompt"), str):
        values["negative_prompt"] = bool(text)
    return repr((shared.command, sorted(values.items())))


def _grouped(settings: Sequence[JobSettings], checked: Sequence[_Checked]) -> list[LedgerSettings]:
    """The settings with the number of the model that they run on.

    A model is loaded once, so `offload auto` is for its most demanding video; only settings that do
    not work in that mode load the model again, in their own.
    """
    modes = list(OFFLOADS)
    groups: dict[str, list[int]] = {}
    for number, one in enumerate(checked):
        groups.setdefault(one.model, []).append(number)
    values = [one.values for one in checked]
    for members in groups.values():
        autos = {n: checked[n].estimate for n in members if checked[n].auto}
        estimates = {n: estimate for n, estimate in autos.items() if estimate}
        most = max((e.offload for e in estimates.values()), key=modes.index, default="")
        for number, estimate in estimates.items():
            mode = most if most in estimate.possible else estimate.offload
            values[number] = {**values[number], "offload": mode}
    models: dict[tuple[str, str], int] = {}
    keys = [(c.model, v.get("offload", "")) for c, v in zip(checked, values, strict=True)]
    numbers = [models.setdefault(key, len(models)) for key in keys]
    return [
        LedgerSettings(model, shared.command, one)
        for model, shared, one in zip(numbers, settings, values, strict=True)
    ]
