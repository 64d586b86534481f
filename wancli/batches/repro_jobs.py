"""Jobs of a batch that reproduce videos from their records."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from wancli.api.repro import recorded_settings, refuse_files
from wancli.api.requests import Listener, all_layers, split
from wancli.batches.jobs import JOB_KEYS
from wancli.config.resolve import Layer, fields_of, resolve
from wancli.config.settings import RolloutSettings, Settings
from wancli.errors import InputError, SettingsError, WancliError
from wancli.planning.existing import read_record
from wancli.planning.input_files import find_recorded_files
from wancli.planning.job_rows import at_line
from wancli.planning.jobs import BatchFile, BatchJob, JobSettings
from wancli.records.naming import literal


def with_records(batch: BatchFile, listener: Listener) -> BatchFile:
    """A batch whose `repro` jobs have the command, prompt, seed and settings of their records.

    What such a job sets itself stays. Raises WancliError with the line.
    """
    repros = {n: one for n, one in enumerate(batch.settings) if one.command == "repro"}
    if not repros:
        return batch
    recorded: dict[int, tuple[JobSettings, BatchJob]] = {}
    for number, one in repros.items():
        try:
            recorded[number] = _recorded(one, listener)
        except WancliError as error:
            raise at_line(batch.origin, one.line, error) from None
    settings: list[JobSettings] = []
    numbers: dict[str, int] = {}  # alike records share theirs
    moved = []
    for number, one in enumerate(batch.settings):
        shared = recorded[number][0] if number in recorded else one
        key = repr((shared.command, sorted(shared.values.items())))
        moved.append(numbers.setdefault(key, len(numbers)))
        if moved[-1] == len(settings):
            settings.append(shared)
    jobs = []
    for job in batch.jobs:
        earlier = recorded[job.settings][1] if job.settings in recorded else job
        jobs.append(
            replace(
                job,
                settings=moved[job.settings],
                prompt=earlier.prompt if job.prompt is None else job.prompt,
                seed=earlier.seed if job.seed is None else job.seed,
                output=job.output or earlier.output,
            )
        )
    return replace(batch, settings=settings, jobs=jobs)


def _recorded(shared: JobSettings, listener: Listener) -> tuple[JobSettings, BatchJob]:
    """The settings of one `repro`, and a job with the prompt, seed and output of its record."""
    own = {name: value for name, value in shared.values.items() if name != "file"}
    if not isinstance(shared.values.get("file"), str):
        raise SettingsError("repro needs the `file` of a video.", hint='"file": "x.mp4"')
    file = Path(shared.values["file"])
    record = read_record(file)
    request, command = record["request"], "generate"
    if record["command"] == "rollout":
        refuse_files(request, file)
        command = "rollout"
    values = {**_differing(record, file, own, listener), **_inputs(request, file, command), **own}
    settings = JobSettings(command, values, shared.line)
    output = literal(f"{file.stem}-repro.mp4")
    return settings, BatchJob(shared.line, 0, request["prompt"], request["seed"], output)


def _differing(
    record: Mapping[str, Any], file: Path, own: Mapping[str, Any], listener: Listener
) -> dict[str, Any]:
    """The settings of a record that its model would not have anyway, as keywords."""
    kind = RolloutSettings if record["command"] == "rollout" else Settings
    model = own.get("model", record["request"]["model"])
    anyway = resolve(all_layers({"model": model}, listener)[0], kind).settings
    tables = recorded_settings(record, file, own)
    recorded = resolve([Layer(f"record of {file.name}", tables)], kind).settings
    keys = JOB_KEYS["rollout" if kind is RolloutSettings else "generate"]
    changed = split(own)[0].tables  # `size` is two settings
    values = {"model": model}
    for table, name, _ in fields_of(kind):
        before, after = (getattr(one, table) if table else one for one in (recorded, anyway))
        value = getattr(before, name)
        free = name in keys and name != "offload" and name not in changed.get(table or "", ())
        if free and value != getattr(after, name):
            values[name] = list(value) if isinstance(value, tuple) else value
    return values


def _inputs(request: Mapping[str, Any], file: Path, command: str) -> dict[str, Any]:
    """What else a record was made from, as keywords. Raises InputError."""
    inputs = request.get("inputs", {})
    if command == "generate":
        named = find_recorded_files(inputs, file).named()
        texts = {name: [str(path) for path in paths] for name, paths in named.items()}
        files: dict[str, Any] = {n: v if n == "ref_image" else v[0] for n, v in texts.items()}
        return files | ({"task": inputs["task"]} if "task" in inputs else {})
    if len(inputs.get("seeds", [])) > 1:
        raise InputError(
            f"{file} has chunks of several seeds, which a batch does not reproduce.",
            hint=f"wancli repro {file}",
        )
    changes = inputs.get("changes", [])
    return {"at": {int(chunk): prompt for chunk, prompt in changes}} if changes else {}
