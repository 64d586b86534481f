"""The jobs of a batch, from the rows of its file.

A job has the settings of its command by name, as flags or keyword arguments spell them. Every list
expands, and so do seeds such as `0-3`: the jobs of a line are all combinations. Many jobs share few
settings, so those are kept once, for each to be validated once.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

from wancli.config.keywords import instead
from wancli.config.layers import environment, user_tables
from wancli.config.seeds import parse_seeds
from wancli.errors import SettingsError, UsageError, WancliError, closest, shortened
from wancli.planning.job_rows import (
    HINT,
    NO_DEFAULTS,
    STDIN,
    Defaults,
    about_defaults,
    at_line,
    at_lines,
    job_unit,
    keyword,
    parse_row,
    read_rows,
)
from wancli.planning.prompts import check_prompt
from wancli.utils.units import is_count

MOST_JOBS = 1_000_000
MOST_VIDEOS = 10_000  # of one line by `num_videos`
_LISTS = ("lora", "ref_image")  # settings that are lists; a list of lists expands
_OWN = ("prompt", "seed", "num_videos", "output", "id", "command")  # of a job, not shared
_PRESETS = ("preset", "cachedit_preset", "model")  # a model's settings are a preset of its name


@dataclass(frozen=True)
class JobSettings:
    """What several jobs share: the command, and its settings by keyword."""

    command: str
    values: Mapping[str, Any]
    line: int  # of the first job that has them


@dataclass(frozen=True, slots=True)
class BatchJob:
    """One video to make. Without a `seed` it is `JobSeeds`' to choose."""

    line: int  # in the file, from 1; in TOML the number of the job
    settings: int  # index of its JobSettings
    prompt: str | None = None
    seed: int | None = None
    output: str | None = None  # name or template
    id: str | None = None


@dataclass(frozen=True)
class BatchFile:
    """The jobs of a file, in order; `digest` is equal for files of the same jobs.

    `environment` has the values of settings where a job has none of its own.
    """

    origin: str
    settings: Sequence[JobSettings]
    jobs: Sequence[BatchJob]
    digest: str
    environment: Mapping[str, str]
    defaults: Defaults = NO_DEFAULTS

    def defaults_in(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a job's values that are the file's defaults."""
        _, named = self.defaults
        several = {key: v if _is_matrix(key, v) else [v] for key, v in named.items()}
        return {key: value for key, value in values.items() if value in several.get(key, ())}


class JobSeeds:
    """Seeds of jobs that have none: by what they are, so that they are the same in each ledger.

    Jobs that are alike have seeds of their own.
    """

    def __init__(self, batch: BatchFile) -> None:
        self._settings = [_settings_text(one) for one in batch.settings]
        self._used = set[int]()
        self._next: dict[tuple[int, str | None], int] = {}  # by settings and prompt

    def of(self, job: BatchJob) -> int:
        """The seed of a job, which has 31 bits. To be called in the order of the file."""
        if job.seed is not None:
            return job.seed
        alike = job.settings, job.prompt
        seed = self._next.get(alike)
        if seed is None:
            text = repr((self._settings[job.settings], job.prompt))
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) >> 1
        while seed in self._used:
            seed = (seed + 1) % 2**31
        self._used.add(seed)
        self._next[alike] = (seed + 1) % 2**31
        return seed


def read_jobs(path: Path, known: Mapping[str, Collection[str]]) -> BatchFile:
    """Read a file of jobs, or standard input for `-`; `known` has the keys of each command.

    What the environment names where a job does not is part of the batch, as its own values are, and
    so is what the user's config.toml and presets say now.
    Raises InputError for a file that cannot be read, SettingsError or UsageError with the line for
    what is in it.
    """
    origin = "standard input" if path == STDIN else str(path)
    defaults, rows = read_rows(path, origin)
    reader = _JobReader(origin, known, defaults)
    jobs: list[BatchJob] = []
    wrong: dict[int, WancliError] = {}
    for line, row in rows:
        try:
            jobs.extend(islice(reader.jobs_of(line, row), MOST_JOBS + 1 - len(jobs)))
        except WancliError as error:
            if not wrong and same_error(error, reader.try_defaults):
                raise about_defaults(origin, defaults, error) from None
            wrong[line] = error
        if len(jobs) > MOST_JOBS:
            raise at_line(
                origin, line, UsageError(f"over {MOST_JOBS:,} jobs.", hint="split the file")
            )
    if wrong:
        raise at_lines(origin, wrong)
    if not jobs:
        raise UsageError(f"{origin} has no jobs.", hint=HINT)
    named = environment()
    under = [replace(one, values={**named, **one.values}) for one in reader.settings]
    shared = defaults[0], reader.defaults
    return BatchFile(origin, reader.settings, jobs, _digest(under, jobs), named, shared)


def same_error(error: WancliError, attempt: Callable[[], object]) -> bool:
    """Whether an attempt ends in the same error."""
    try:
        attempt()
    except WancliError as other:
        return str(other) == str(error)
    return False


class _JobReader:
    """Makes jobs of rows, and collects the settings that they share."""

    def __init__(
        self, origin: str, known: Mapping[str, Collection[str]], defaults: Defaults
    ) -> None:
        self.settings: list[JobSettings] = []
        self._known, self._unit = known, job_unit(origin)
        self._numbers: dict[str, int] = {}  # of settings, by their repr
        self._checked: set[tuple[str, ...]] = set()  # names that are valid together
        self._ids: dict[str, int] = {}  # lines
        try:
            self.defaults = self._check_defaults(defaults[1])
        except WancliError as error:
            raise about_defaults(origin, defaults, error) from None

    def jobs_of(self, line: int, row: Mapping[str, Any] | str) -> Iterator[BatchJob]:
        """The jobs of a line. Raises WancliError."""
        values = self.defaults | _spelled(parse_row(row) if isinstance(row, str) else row)
        job = {key: value for key, value in values.items() if value is not None}
        self._check(job.get("command", "generate"), job)
        yield from self._expand(line, job)

    def try_defaults(self) -> None:
        """Raise the WancliError that the defaults' values are alone, whatever command has them."""
        for _ in self._expand(0, {k: v for k, v in self.defaults.items() if v is not None}):
            pass

    def _check_defaults(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Defaults by keyword. Raises WancliError for a key that no command has."""
        defaults = _spelled(values)
        unknown = defaults.keys() - {*chain(*self._known.values())}
        command = defaults.get("command")
        self._check("generate" if command is None else command, sorted(unknown))
        return defaults

    def _expand(self, line: int, row: dict[str, Any]) -> Iterator[BatchJob]:
        command = row.get("command", "generate")
        name = self._unique(line, row.get("id"))
        seeds = _seeds(row.get("seed"), row.get("num_videos"))
        shared = {key: value for key, value in row.items() if key not in _OWN}
        prompts = _texts("prompt", row.get("prompt"))
        prompts = [None if prompt is None else check_prompt(prompt) for prompt in prompts]
        outputs = _texts("output", row.get("output"))
        for values in _combinations(shared):
            number = self._number(line, command, values)
            for prompt, seed, output in product(prompts, seeds, outputs):
                yield BatchJob(line, number, prompt, seed, output, name)

    def _check(self, command: Any, keys: Collection[str]) -> None:
        """Raise SettingsError for a command or a key that is not known."""
        names = (command, *keys)
        try:
            if names in self._checked:
                return
        except TypeError:
            pass  # the command is a list, say
        if not isinstance(command, str) or command not in self._known:
            near = closest(str(command), self._known)
            hint = f"did you mean '{near}'?" if near else ", ".join(self._known)
            raise SettingsError(f"unknown command {shortened(command)}.", hint=hint)
        known = {*self._known[command], *_OWN}
        for key in keys:
            if key not in known:
                near = closest(key, known)
                similar = f"did you mean '{near}'?" if near else f"wancli {command} --help"
                raise SettingsError(
                    f"unknown key '{key}' of {command}.", hint=instead(command, key) or similar
                )
        self._checked.add(names)

    def _unique(self, line: int, name: Any) -> str | None:
        if name is None:
            return None
        if isinstance(name, bool | list | dict):
            raise SettingsError(f"`id` {shortened(name)} is no name.", hint='"id": "shot-1"')
        text = str(name)
        first = self._ids.setdefault(text, line)
        if first != line:
            raise UsageError(
                f"the id '{text}' is that of {self._unit} {first}, too.", hint="another id"
            )
        return text

    def _number(self, line: int, command: str, values: Mapping[str, Any]) -> int:
        """The number of these settings, which are new or were on an earlier line."""
        key = repr((command, sorted(values.items())))  # unlike equality, tells 1 from true
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self.settings)
            self.settings.append(JobSettings(command, dict(values), line))
        return number


def _spelled(row: Mapping[str, Any]) -> dict[str, Any]:
    """Keys as keyword arguments: `--num-frames` and `num-frames` are `num_frames`.

    A value of null unsets a default. Raises SettingsError for a key that stands twice.
    """
    spelled: dict[str, Any] = {}
    for key, value in row.items():
        name = keyword(key)
        if name in spelled:
            raise SettingsError(f"the key '{name}' stands twice.", hint="drop one of them")
        spelled[name] = value
    return spelled


def _seeds(value: Any, count: Any) -> Sequence[int | None]:
    """Seeds of `7`, `0-3`, or a list of them; `count` of them up from a single one."""
    number = None if count is None else _count(count)
    if value is None:
        return [None] * (number or 1)
    if type(value) is int and number is None and 0 <= value < 2**53:
        return [value]
    texts = value if isinstance(value, list) else [value]
    if not texts:
        raise SettingsError("`seed` is an empty list.", hint='`seed`: 7, "0-3" or [1, 2]')
    seeds = list(chain.from_iterable(_listed_seeds(text, number) for text in texts))
    known = [seed for seed in seeds if seed is not None]
    if len(set(known)) < len(known):
        raise SettingsError("`seed` lists a seed twice.", hint="list each seed once")
    return seeds


def _listed_seeds(value: Any, number: int | None) -> Sequence[int | None]:
    return [None] * (number or 1) if value == "random" else parse_seeds(_seed_text(value), number)


def _seed_text(value: Any) -> str:
    return "not a seed" if isinstance(value, bool | float | list | dict) else str(value)


def _count(value: Any) -> int:
    text = str(value)
    if not (is_count(text) and 1 <= int(text) <= MOST_VIDEOS):
        raise SettingsError(
            f"`num_videos {text[:40]}`: not a number of videos.", hint=f"1 to {MOST_VIDEOS}"
        )
    return int(text)


def _is_matrix(name: str, value: Any) -> bool:
    """Whether a value is a list of several values."""
    if name in _LISTS:
        return isinstance(value, list) and any(isinstance(inner, list) for inner in value)
    return isinstance(value, list)


def _values(name: str, value: Any) -> Sequence[Any]:
    """The values of a key that expands. Raises SettingsError for an empty list."""
    if not _is_matrix(name, value):
        return [value]
    if not value:
        raise SettingsError(f"`{name}` is an empty list.", hint="drop it, or list its values")
    return list(value)


def _combinations(shared: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    lists = {name: _values(name, v) for name, v in shared.items() if _is_matrix(name, v)}
    if not lists:
        yield shared
        return
    for chosen in product(*lists.values()):
        yield {**shared, **dict(zip(lists, chosen, strict=True))}


def _texts(name: str, value: Any) -> Sequence[str | None]:
    """The texts of a key that expands; [None] where it is unset. Raises SettingsError."""
    values = _values(name, value)
    for text in values:
        if value is not None and not isinstance(text, str):
            raise SettingsError(f"`{name}` {shortened(text)} is not text.", hint=f'"{name}": "…"')
    return values


def _settings_text(settings: JobSettings) -> str:
    """Equal for the same settings, in whatever order."""
    return repr((settings.command, sorted(settings.values.items())))


def _digest(settings: Sequence[JobSettings], jobs: Iterable[BatchJob]) -> str:
    """Digest of all jobs, whatever the file's format and line ends, and of the user's settings."""
    digest = hashlib.sha256()
    presets = [one.values.get(key) for one in settings for key in _PRESETS]
    for tables in user_tables(name for name in presets if isinstance(name, str)):
        digest.update(repr(tables).encode())
    for one in settings:
        digest.update(_settings_text(one).encode())
    for job in jobs:
        fields = (job.settings, job.prompt, job.seed, job.output, job.id)
        digest.update(repr(fields).encode())
    return digest.hexdigest()[:16]
