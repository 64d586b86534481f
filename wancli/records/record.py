"""The request and outcome of a video as one JSON object. Units are in the key names."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from wancli.catalog.tiny_decoder import DECODER
from wancli.config.resolve import ADAPTED, dotted, fields_of
from wancli.config.settings import WEIGHTS, RolloutSettings, Settings
from wancli.errors import InputError, WancliError, missing
from wancli.records.schema import Record, RolloutRecord, check_schema
from wancli.utils.files import write_whole
from wancli.utils.outputs import sidecar
from wancli.utils.reading import parse_json, read_text, unreadable

SCHEMA = "wancli.run/1"
ROLLOUT_SCHEMA = "wancli.rollout/1"
ROLLOUT_FILE = "rollout.json"  # in NAME.rollout/: the rollout's request
UNFINISHED = "unfinished"  # status of the record in a partial stream
UNFINISHED_JSON = json.dumps({"schema": SCHEMA, "status": UNFINISHED})  # without metadata
_MOVED = ("sampler", "steps_list", "warp_steps")  # from the rollout's settings
BEFORE_FAST_DECODING = {"vae_exact": True}  # in requests of versions that had no other way
_BEFORE = re.compile(r"^.*?(?=(@(high|low))?(=[^=]*)?$)")  # a LoRA's expert and scale: its file
# Settings that requests of earlier versions did not have: at their defaults, no part of the hash.
_ADDED = (
    f"machine.{DECODER}", "rollout.image_start", "rollout.recache_by", "rollout.kv_recompute",
    "rollout.reencode_first", "rollout.shot_prefix", "rollout.shot_offset", "rollout.shot_sink",
)  # fmt: skip
_HOW_IT_IS_MADE = ("machine", "output", "prompt_kv", "sources")  # tables of a request
EMBEDDED_LIMIT = 32_000  # bytes of JSON inside an MP4


@dataclass(frozen=True)
class Request:
    """One video to generate."""

    prompt: str
    seed: int
    settings: Settings
    sources: Mapping[str, str]  # of every setting, by dotted key
    model_revision: str = ""  # identifies the weights
    inputs: Mapping[str, Any] = field(default_factory=dict)  # input files, prompt changes, seeds
    warnings: Sequence[str] = ()  # printed beforehand; not part of the request
    loras: Sequence[Mapping[str, Any]] = ()  # what becomes of their keys; nor is this
    weights: Sequence[Mapping[str, Any]] = ()  # files instead of the model's own

    def as_json(self) -> dict[str, Any]:
        """All resolved values and their sources."""
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            **self.settings.model_dump(mode="json"),
            "model_revision": self.model_revision,
            **({"weights": self.weights} if self.weights else {}),
            **({"inputs": self.inputs} if self.inputs else {}),
            "sources": {k: v for k, v in self.sources.items() if v != "default"},
        }

    @property
    def hash(self) -> str:
        """Equal for requests that give the same frames on the same machine."""
        values = self.as_json()
        del values["sources"]
        del values["output"]["metadata"], values["machine"]["offload"]
        del values["prompt_kv"]["prompt_kv"], values["prompt_kv"]["free_kv_weights"]
        for name in WEIGHTS:
            del values["machine"][name]  # the weights have its digest
        # So has the revision those of LoRAs, wherever they are.
        values["machine"]["lora"] = [_BEFORE.sub("", text) for text in values["machine"]["lora"]]
        for table, name, info in fields_of(type(self.settings)):
            if table and dotted(table, name) in _ADDED and values[table][name] == info.default:
                del values[table][name]
        if "weights" in values:
            values["weights"] = digests(values["weights"])
            if DECODER in values["weights"]:
                del values["machine"][DECODER]
        if "inputs" in values:
            values["inputs"] = without_paths(values["inputs"])
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def is_recorded_by(self, record: Mapping[str, Any]) -> bool:
        """Whether a record is of this request, also where its job went on with less memory."""
        sources, made = (
            table if isinstance(table := record["request"].get(name), Mapping) else {}
            for name in ("sources", "machine")
        )
        adapted = {n: v for n, v in made.items() if sources.get(f"machine.{n}") == ADAPTED}
        machine = self.settings.machine.model_copy(update=adapted)
        settings = self.settings.model_copy(update={"machine": machine})
        return bool(record["hash"] == replace(self, settings=settings).hash)


def is_same_video(request: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two requests as JSON are for one video: they may differ in how the machine makes it.

    So they do where a job goes on with less memory.
    """
    first, second = (json.dumps(_video_of(one), sort_keys=True) for one in (request, other))
    return first == second


def _video_of(request: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: value for name, value in request.items() if name not in _HOW_IT_IS_MADE}
    values["lora"] = [_BEFORE.sub("", text) for text in request["machine"].get("lora", ())]
    values["weights"] = digests(request.get("weights", ()))
    return without_paths(values)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ForwardStats:
    """Blocks that one forward computed or reused from a step cache."""

    step: int  # from 0
    branch: str  # cond or uncond
    blocks: int  # computed; 0 if the whole forward was skipped
    blocks_all: int  # in the transformer
    reused: bool
    residual: float | None = None  # relative change compared to the threshold, if any


def reuse_json(stats: Sequence[ForwardStats]) -> dict[str, int]:
    """Totals over forwards, for the record."""
    return {
        "forwards": len(stats),
        "reused": sum(forward.reused for forward in stats),
        "blocks": sum(forward.blocks for forward in stats),
        "blocks_all": sum(forward.blocks_all for forward in stats),
    }


@dataclass(frozen=True)
class RunRecord:
    """The outcome of one request."""

    id: str
    status: str  # ok, failed, skipped, unfinished
    command: str
    created: str  # ISO 8601, UTC
    request: Mapping[str, Any]
    hash: str
    output: Mapping[str, Any] = field(default_factory=dict)
    timings: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)  # GiB, and how it was offloaded
    env: Mapping[str, str] = field(default_factory=dict)
    drift: Mapping[str, Any] = field(default_factory=dict)  # of a rollout
    cache: Mapping[str, Any] = field(default_factory=dict)  # reuse by step caches
    error: Mapping[str, Any] | None = None
    warnings: Sequence[str] = ()  # printed before the run
    lora: Sequence[Mapping[str, Any]] = ()  # keys applied and dropped, of each
    schema: str = SCHEMA

    def as_json(self) -> dict[str, Any]:
        """The record for the sidecar and `--json`."""
        record = {"schema": self.schema, **asdict(self)}
        for name in ("drift", "cache", "warnings", "lora"):
            if not record[name]:
                del record[name]
        return record

    def embedded(self) -> str:
        """The record for the MP4: no step timings, environment, machine or absolute paths."""
        record = self.as_json()
        record["timings"] = {k: v for k, v in record["timings"].items() if k.endswith("_s")}
        record["env"], record["memory"] = {}, {}
        record.pop("drift", None)
        record["output"] = {k: v for k, v in record["output"].items() if k != "path"}
        if Path(record["request"]["model"]).is_absolute():
            record["request"]["model"] = Path(record["request"]["model"]).name
        for name in record["request"].keys() & {"inputs", "weights"}:
            record["request"][name] = without_paths(record["request"][name])
        if "weights" in record["request"]:
            machine = record["request"]["machine"]
            names = {n: _name(machine[n]) for n in WEIGHTS}
            if Path(machine[DECODER]).is_absolute():
                names[DECODER] = _name(machine[DECODER])
            record["request"]["machine"] = {**machine, **names}
        text = json.dumps(record, ensure_ascii=False)
        if len(text.encode()) > EMBEDDED_LIMIT:
            record["request"]["sources"] = {}
            text = json.dumps(record, ensure_ascii=False)
        return text


def _name(path: Any) -> Any:
    """The name of each file in a setting."""
    return Path(path).name if isinstance(path, str) else [*map(_name, path)]


def digests(weights: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """What identifies files of weights, by part, whatever their names."""
    return {entry["part"]: entry["digest"] for entry in weights}


def without_paths(value: Any) -> Any:
    """Files by name and digest only, wherever they are stored."""
    if isinstance(value, Mapping):
        return {key: without_paths(inner) for key, inner in value.items() if key != "path"}
    return [*map(without_paths, value)] if isinstance(value, list) else value


def error_json(error: WancliError) -> dict[str, Any]:
    """An error as a record stores it."""
    return {
        "type": type(error).__name__,
        "message": str(error),
        "exit_code": error.exit_code,
        "hint": error.hint,
    }


def parse_record(text: str, *, origin: str) -> dict[str, Any]:
    """Parse a record from a comment or sidecar. Raises InputError if it is foreign or broken."""
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
    check_schema(text, RolloutRecord if rollout else Record, origin=origin)
    return record


def read_record_file(path: Path) -> dict[str, Any]:
    """Read a record from a JSON file. Raises InputError."""
    try:
        text = read_text(path)
    except FileNotFoundError:
        raise missing("record", path) from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error, hint="give a file that wancli generate wrote") from None
    return parse_record(text, origin=str(path))


def write_record(record: RunRecord, video: Path, replaced: Collection[Path]) -> None:
    """Write the record beside its video or latents. Raises OutputError.

    An existing file is an error, unless its path is in `replaced`.
    """
    path = sidecar(video)
    write_json(record.as_json(), path, overwrite=path in replaced)


def write_json(value: Mapping[str, Any], path: Path, *, overwrite: bool = False) -> None:
    """Write JSON whole or not at all. Raises OutputError."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    hint = "free some space; videos hold their record themselves: wancli show FILE"
    write_whole(path, text.encode(), hint=hint, overwrite=overwrite)


def settings_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a record, by table, as layers expect them."""
    request = record["request"]
    tables = {name: request[name] for name in RolloutSettings.model_fields if name in request}
    if isinstance(machine := tables.get("machine"), Mapping):
        tables["machine"] = {**BEFORE_FAST_DECODING, **machine}
    rollout, sampling = tables.get("rollout"), tables.get("sampling", {})
    if isinstance(rollout, Mapping) and isinstance(sampling, Mapping):
        tables |= _with_scheduler(rollout, sampling)
    return tables


def _with_scheduler(rollout: Mapping[str, Any], sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Both tables, of which the first had a `sampler` before clips had few steps."""
    old = {name: value for name, value in rollout.items() if name in _MOVED}
    kept = {name: value for name, value in rollout.items() if name not in _MOVED}
    if old.pop("sampler", None) == "few-step":
        sampling = {**sampling, **old, "scheduler": "few-step"}
    return {"rollout": kept, "sampling": sampling}


def rounded(timings: Mapping[str, Any]) -> dict[str, Any]:
    """Timings with every float rounded to four digits."""

    def shorter(value: Any) -> Any:
        if isinstance(value, float):
            return round(value, 4)
        if isinstance(value, Mapping):
            return rounded(value)
        return [shorter(v) for v in value] if isinstance(value, list) else value

    return {name: shorter(value) for name, value in timings.items()}
