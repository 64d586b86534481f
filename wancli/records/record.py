"""What was asked and what happened, as one JSON object per video. Units are in the key names."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wancli.config.settings import RolloutSettings, Settings
from wancli.errors import InputError, WancliError, missing
from wancli.records.schema import Record, RolloutRecord, check_told
from wancli.utils.files import write_whole
from wancli.utils.outputs import sidecar
from wancli.utils.reading import parse_json, read_text, unreadable

SCHEMA = "wancli.run/1"
ROLLOUT_SCHEMA = "wancli.rollout/1"
ROLLOUT_FILE = "rollout.json"  # in NAME.rollout/: what the rollout was asked for
UNFINISHED = json.dumps({"schema": SCHEMA, "status": "unfinished"})  # of what tells no more
EMBEDDED_LIMIT = 32_000  # bytes of JSON inside an MP4


@dataclass(frozen=True)
class Request:
    """One video to make."""

    prompt: str
    seed: int
    settings: Settings
    sources: Mapping[str, str]  # of every setting, by dotted key
    model_revision: str = ""  # sha256 of what identifies the weights
    inputs: Mapping[str, Any] = field(default_factory=dict)  # what else it was given
    warnings: Sequence[str] = ()  # said before it is made, and no part of it

    def as_json(self) -> dict[str, Any]:
        """Every resolved value and where it came from."""
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            **self.settings.model_dump(mode="json"),
            "model_revision": self.model_revision,
            **({"inputs": self.inputs} if self.inputs else {}),
            "sources": {k: v for k, v in self.sources.items() if v != "default"},
        }

    @property
    def hash(self) -> str:
        """Equal for requests whose frames would be equal, but for the machine."""
        told = self.as_json()
        del told["sources"]
        del told["output"]["metadata"], told["machine"]["offload"]
        del told["prompt_kv"]["prompt_kv"], told["prompt_kv"]["free_kv_weights"]
        if "inputs" in told:
            told["inputs"] = without_paths(told["inputs"])
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ForwardStats:
    """What one forward computed, and what it took over from the one before."""

    step: int  # from 0
    branch: str  # cond or uncond
    blocks: int  # computed; 0 where the forward was not made at all
    blocks_all: int  # of the transformer
    reused: bool
    residual: float | None = None  # relative change that decided; None where nothing was compared


def reuse_json(uses: Sequence[ForwardStats]) -> dict[str, int]:
    """What forwards come to, for the record."""
    return {
        "forwards": len(uses),
        "reused": sum(use.reused for use in uses),
        "blocks": sum(use.blocks for use in uses),
        "blocks_all": sum(use.blocks_all for use in uses),
    }


@dataclass(frozen=True)
class RunRecord:
    """What happened to one request."""

    id: str
    status: str  # ok, failed, skipped
    command: str
    created: str  # ISO 8601, UTC
    request: Mapping[str, Any]
    hash: str
    output: Mapping[str, Any] = field(default_factory=dict)
    timings: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)  # GiB, and how it was offloaded
    env: Mapping[str, str] = field(default_factory=dict)
    drift: Mapping[str, Any] = field(default_factory=dict)  # of a rollout
    cache: Mapping[str, Any] = field(default_factory=dict)  # what was reused, where anything may be
    error: Mapping[str, Any] | None = None
    warnings: Sequence[str] = ()  # said before it was made
    schema: str = SCHEMA

    def as_json(self) -> dict[str, Any]:
        """For the sidecar and the `--json` line."""
        told = {"schema": self.schema, **asdict(self)}
        for name in ("drift", "cache", "warnings"):
            if not told[name]:
                del told[name]
        return told

    def embedded(self) -> str:
        """For the MP4: no step timings, environment, machine or absolute paths."""
        told = self.as_json()
        told["timings"] = {k: v for k, v in told["timings"].items() if k.endswith("_s")}
        told["env"], told["memory"] = {}, {}
        told.pop("drift", None)
        told["output"] = {k: v for k, v in told["output"].items() if k != "path"}
        if Path(told["request"]["model"]).is_absolute():
            told["request"]["model"] = Path(told["request"]["model"]).name
        if "inputs" in told["request"]:
            told["request"]["inputs"] = without_paths(told["request"]["inputs"])
        text = json.dumps(told, ensure_ascii=False)
        if len(text.encode()) > EMBEDDED_LIMIT:
            told["request"]["sources"] = {}
            text = json.dumps(told, ensure_ascii=False)
        return text


def without_paths(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same files by name and digest only: wherever they lie, they are the same."""

    def placeless(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: inner for key, inner in value.items() if key != "path"}
        return [placeless(entry) for entry in value] if isinstance(value, list) else value

    return {name: placeless(value) for name, value in inputs.items()}


def error_json(error: WancliError) -> dict[str, Any]:
    """An error as a record holds it."""
    return {
        "type": type(error).__name__,
        "message": str(error),
        "exit_code": error.exit_code,
        "hint": error.hint,
    }


def parse_record(text: str, *, origin: str) -> dict[str, Any]:
    """The record in a comment or a sidecar; InputError when it is none of ours, or is broken."""
    try:
        record = parse_json(text)
        json.dumps(record, allow_nan=False)  # NaN and Infinity are Python's, and no JSON
    except ValueError:
        record = {}
    if record.get("schema") != SCHEMA:
        raise InputError(
            f"{origin} holds no wancli record.", hint="give a file that wancli generate wrote"
        )
    rollout = record.get("command") == "rollout"
    check_told(text, RolloutRecord if rollout else Record, origin=origin)
    return record


def read_record_file(path: Path) -> dict[str, Any]:
    """The record that a JSON file is. Raises InputError."""
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise missing("record", path) from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error, hint="give a file that wancli generate wrote") from None
    return parse_record(text, origin=str(path))


def write_record(record: RunRecord, video: Path, replaced: Collection[Path]) -> None:
    """Write the record beside its video, or beside latents. Raises OutputError.

    One that is there stays, and is an error, unless its path is `replaced`.
    """
    path = sidecar(video)
    write_json(record.as_json(), path, overwrite=path in replaced)


def write_json(value: Mapping[str, Any], path: Path, *, overwrite: bool = False) -> None:
    """Write JSON whole or not at all. Raises OutputError."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    hint = "free some space; videos hold their record themselves: wancli show FILE"
    write_whole(path, text.encode(), hint=hint, overwrite=overwrite)


def settings_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a record, by table, as a layer takes them."""
    told = record["request"]
    return {name: told[name] for name in RolloutSettings.model_fields if name in told}


def rounded(timings: Mapping[str, Any]) -> dict[str, Any]:
    """Four digits of every float."""

    def shorter(value: Any) -> Any:
        if isinstance(value, float):
            return round(value, 4)
        if isinstance(value, Mapping):
            return rounded(value)
        return [shorter(v) for v in value] if isinstance(value, list) else value

    return {name: shorter(value) for name, value in timings.items()}
