"""Reproducing a video from its own record: its settings, its weights and its input files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wancli.catalog.decoder_files import find_recorded_decoder
from wancli.catalog.tasks import setting_of
from wancli.catalog.tiny_decoder import DECODER
from wancli.catalog.weight_files import find_recorded
from wancli.errors import InputError
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
