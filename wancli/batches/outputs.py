"""Outputs of a batch: names that differ, and files that are not replaced unasked."""

import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wancli.api.requests import Listener
from wancli.batches.jobs import OUTPUTS, REPLACES, for_a_job, input_files, plan_job, with_files
from wancli.errors import UsageError, WancliError
from wancli.generation.batch import PlannedVideos
from wancli.planning.job_rows import at_line, at_lines, job_unit
from wancli.planning.jobs import BatchFile, JobSeeds
from wancli.records.ledger_file import LedgerJob, LedgerSettings
from wancli.records.naming import DEFAULT, NameTemplate, literal, with_name
from wancli.rollouts.session import RolloutSession
from wancli.utils.files import LONGEST_NAME
from wancli.utils.reading import user_path

_MOST_FIELDS = 3  # of a template in a hint, besides prompt and seed


def name_jobs(
    batch: BatchFile, fields: Sequence[Mapping[str, Any]], folder: Path
) -> Iterator[LedgerJob]:
    """Jobs with seeds and the absolute paths of their files.

    `fields` has the values of names by settings. Raises UsageError with the line for an invalid
    name, and for a file that two jobs would write.
    """
    names, seeds = _Names(folder, batch, fields), JobSeeds(batch)
    for job in batch.jobs:
        shared = batch.settings[job.settings]
        seed = seeds.of(job)
        values = names.values(job.settings, job.prompt, seed)
        try:
            output = names.path(job.output or DEFAULT, values, bare=True)
            templates = {n: str(shared.values[n]) for n in OUTPUTS if shared.values.get(n)}
            files = {n: names.path(text, values, bare=False) for n, text in templates.items()}
            named = LedgerJob(job.line, job.settings, job.prompt, seed, output, job.id, files)
            for path in (output, *files.values()):
                names.reserve(path, named)
        except WancliError as error:
            raise at_line(batch.origin, job.line, error) from None
        yield named


class _Names:
    """The outputs of a batch. 100,000 of them take a second: most are text, and not paths."""

    def __init__(self, folder: Path, batch: BatchFile, fields: Sequence[Mapping[str, Any]]) -> None:
        self._folder, self._fields = str(folder.absolute()), fields
        self._unit = job_unit(batch.origin)
        read = (file for one in batch.settings for file in input_files(one.values))
        self._inputs = {_folded(os.path.realpath(file)) for file in read}
        self._templates: dict[str, NameTemplate] = {}
        self._real: dict[str, str] = {}  # folders without links
        self._jobs: dict[str, LedgerJob] = {}  # by what is equal for one file

    def values(self, settings: int, prompt: str | None, seed: int | None) -> dict[str, Any]:
        """What a template may name of a job."""
        return {**self._fields[settings], "prompt": prompt or "", "seed": seed}

    def path(self, template: str, values: Mapping[str, Any], *, bare: bool) -> str:
        """Absolute path of an output; a `bare` name goes into the folder of the batch."""
        if "\0" in template:
            raise UsageError("an output has a NUL character.", hint="another `output`")
        if "{" in template or "}" in template:
            if template not in self._templates:
                self._templates[template] = NameTemplate(template)
            template = self._templates[template].fill(values)
        path = with_name(user_path(template)) if _is_odd(template) else template
        if bare and (isinstance(path, str) or len(path.parts) == 1):
            return f"{self._folder}{os.sep}{path}"
        return str(Path(path).absolute())

    def reserve(self, path: str, job: LedgerJob) -> None:
        """Raise UsageError if an earlier job writes that file, too."""
        place, _, name = path.rpartition(os.sep)
        if place not in self._real:
            self._real[place] = _folded(os.path.realpath(place))
        key = f"{self._real[place]}{os.sep}{_folded(name)}"
        if first := self._jobs.get(key):
            pair = (self.values(one.settings, one.prompt, one.seed) for one in (first, job))
            raise UsageError(
                f"{path} is the output of {self._unit} {first.line}, too.",
                hint=_other_names(*pair, suffix=Path(path).suffix),
            )
        self._jobs[key] = job
        if key in self._inputs:
            raise UsageError(f"{path} is an input of a job, too.", hint="another `output`")


def _other_names(one: Mapping[str, Any], other: Mapping[str, Any], *, suffix: str) -> str:
    """A hint for two jobs of one name: a template with what differs, if that parts them."""
    both = (one.keys() & other.keys()) - {"prompt", "seed"}
    differing = sorted(name for name in both if one[name] != other[name])[:_MOST_FIELDS]
    text = "-".join(f"{{{name}}}" for name in ("prompt:40", *differing, "seed")) + literal(suffix)
    template = NameTemplate(text)
    if template.fill(one) == template.fill(other):
        return "drop one of them, or give each a name of its own"
    return f"put what differs into the name: {text}"


def _is_odd(name: str) -> bool:
    """Whether a name may hold a folder, or be none."""
    return os.sep in name or name.startswith("~") or name in ("", ".", "..")


def _folded(name: str) -> str:
    """Equal for names that are one file on some disk."""
    return name.lower() if name.isascii() else unicodedata.normalize("NFC", name).casefold()


def check_new(
    batch: BatchFile, settings: Sequence[LedgerSettings], jobs: Iterable[LedgerJob], *,
    skip_existing: bool = False,
) -> None:  # fmt: skip
    """Check that a batch that has not begun can write its files, and replaces nothing unasked.

    Raises UsageError or OutputError with the line of the first job that cannot. With
    `skip_existing`, `kept_videos` checks those that exist.
    """
    folders = _Folders()
    more = {
        number for number, one in enumerate(settings) if not one.values.keys().isdisjoint(OUTPUTS)
    }
    for job in jobs:
        shared = settings[job.settings]
        replaces = shared.values.get("overwrite")
        for path in () if replaces or skip_existing else (job.output, *job.files.values()):
            files, name = folders.entries(path)
            if files and files.get(name):
                raise at_line(batch.origin, job.line, _exists(path))
        files, name = folders.entries(job.output)
        odd = files is None or not _is_plain(name, rollout=shared.command == "rollout")
        if files and not odd:
            stem = name[: -len(".mp4")]
            beside = [one for one in (name, f"{stem}.json", f"{stem}.rollout") if one in files]
            if beside and skip_existing:
                continue
            odd = any(not (files[one] and replaces) for one in beside)
        if odd or job.settings in more:
            more.discard(job.settings)
            try:
                _planned(shared, job, skip_existing=skip_existing).check_outputs()
            except WancliError as error:
                raise at_line(batch.origin, job.line, for_a_job(error)) from None


def kept_videos(
    batch: BatchFile, settings: Sequence[LedgerSettings], jobs: Iterable[LedgerJob]
) -> set[str]:
    """The videos that `skip_existing` keeps: they are whole, and of the same jobs.

    Raises WancliError with the lines of jobs under whose names there are those of other requests.
    """
    folders = _Folders()
    kept: set[str] = set()
    wrong: dict[int, WancliError] = {}
    for job in jobs:
        files, name = folders.entries(job.output)
        if not files or {name, f"{name.removesuffix('.mp4')}.rollout"}.isdisjoint(files):
            continue
        try:
            if _planned(settings[job.settings], job, skip_existing=True).kept:
                kept.add(job.output)
        except WancliError as error:
            wrong.setdefault(job.line, for_a_job(error))
    if wrong:
        raise at_lines(batch.origin, wrong)
    return kept


def _exists(path: str) -> UsageError:
    keeps = "`skip_existing` keeps videos of the same jobs"
    return UsageError(f"{path} exists.", hint=f"{keeps}; {REPLACES}")


def _planned(
    shared: LedgerSettings, job: LedgerJob, *, skip_existing: bool
) -> PlannedVideos | RolloutSession:
    """The plan of one job as running it makes it. Raises WancliError."""
    values = {**with_files(shared.values, job.files), "skip_existing": skip_existing}
    return plan_job(
        shared.command, job.prompt, values, Listener(None), seed=job.seed, output=job.output
    )


class _Folders:
    """What is in the folders of outputs, each of which is looked at once."""

    def __init__(self) -> None:
        self._listed: dict[str, dict[str, bool] | None] = {}

    def entries(self, path: str) -> tuple[dict[str, bool] | None, str]:
        """`_regular_files` of a file's folder, and the file's name."""
        place, _, name = path.rpartition(os.sep)
        if place not in self._listed:
            self._listed[place] = _regular_files(place)
        return self._listed[place], name


def _regular_files(folder: str) -> dict[str, bool] | None:
    """Whether each entry of a folder is a regular file; None for what is no folder."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    except FileNotFoundError:
        return {}
    except OSError:
        return None


def _is_plain(name: str, *, rollout: bool) -> bool:
    """Whether a video can have a name: what looks at it closely takes longer."""
    stem, suffix = name[: -len(".mp4")], name[-len(".mp4") :]
    most = LONGEST_NAME - len(".rollout" if rollout else ".mp4")
    return bool(stem) and suffix == ".mp4" and len(os.fsencode(stem)) <= most and name.isprintable()
