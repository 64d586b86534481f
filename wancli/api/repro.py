"""Reproducing a video from its own record: its settings, its weights and its input files."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from wancli.api.jobs import JOB_KEYS
from wancli.api.requests import Listener, all_layers, split
from wancli.catalog.decoder_files import find_recorded_decoder
from wancli.catalog.tasks import setting_of
from wancli.catalog.tiny_decoder import DECODER
from wancli.catalog.weight_files import find_recorded
from wancli.config.resolve import Layer, fields_of, resolve
from wancli.config.settings import RolloutSettings, Settings
from wancli.errors import InputError, SettingsError, WancliError
from wancli.planning.existing import read_record
from wancli.planning.input_files import find_recorded_files
from wancli.planning.jobs import BatchFile, BatchJob, JobSettings, at_line
from wancli.planning.lora import find_recorded_loras
from wancli.records.record import settings_of


def recorded_settings(
    record: Mapping[str, Any], file: Path, others: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings of a record, with its files of weights where they are now.

    Those that `others` name instead are not looked for. Raises InputError or ModelError.
    """
    tables = settings_of(record)
    weights = record["request"].get("weights", [])
    own = [entry for entry in weights if setting_of(entry["part"]) not in others]
    decoders = [entry for entry in own if entry["part"] == DECODER]
    if own := [entry for entry in own if entry not in decoders]:
        tables["machine"] = {**tables["machine"], **find_recorded(own, file)}
    for entry in decoders:
        name = find_recorded_decoder(entry, file, tables["machine"][DECODER], tables["model"])
        tables["machine"] = {**tables["machine"], DECODER: name}
    machine = tables.get("machine")
    if isinstance(machine, dict) and "lora" not in others:
        tables["machine"] = {**machine, "lora": _loras(machine.get("lora", ()), record, file)}
    return tables


def _loras(recorded: Any, record: Mapping[str, Any], file: Path) -> Any:
    """The LoRAs of a record where they are now; what is no list of them is checked later."""
    if isinstance(recorded, list) and all(isinstance(text, str) for text in recorded):
        revision = record["request"].get("model_revision", "")
        return find_recorded_loras(recorded, revision, file)
    return recorded


def refuse_files(request: Mapping[str, Any], file: Path) -> None:
    """Raise InputError for a rollout that started from files: a record has only their digests."""
    inputs = request.get("inputs", {})
    names = [f"`{name}`" for name, value in inputs.items() if isinstance(value, dict)]
    if names:
        raise InputError(
            f"{file} needs the files that it started from: {', '.join(names)}.",
            hint=f"wancli rollout with its settings (wancli show {file}) and {' and '.join(names)}",
        )


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
    output = f"{file.stem}-repro.mp4"
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
