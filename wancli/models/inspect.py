"""Inspect a model folder through its JSON files and the headers of its weights, without torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from wancli.catalog.hf_configs import CLASSES, part_config
from wancli.catalog.hub_cache import find_cached
from wancli.catalog.local import broken_weights, find_spec, read_config, spec_of_folder
from wancli.catalog.specs import ModelSpec
from wancli.catalog.tasks import EXPERTS, TASKS
from wancli.catalog.wan import Architecture
from wancli.cost.wan import part_parameters
from wancli.errors import ModelError
from wancli.utils.reading import read_header, read_json

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Part:
    """One component of a pipeline; `dtypes` of its tensors, the most common first."""

    name: str
    kind: str  # class name
    parameters: int
    dtypes: tuple[str, ...]
    bytes: int
    config: Mapping[str, Any]


@dataclass(frozen=True)
class ModelInfo:
    """A model, its components where they are known, and the files missing on this disk."""

    spec: ModelSpec
    parts: tuple[Part, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of parameters of all components."""
        return sum(part.parameters for part in self.parts)

    @property
    def bytes(self) -> int:
        """Size of all weights."""
        return sum(part.bytes for part in self.parts)

    def as_json(self) -> dict[str, Any]:
        """All fields, with totals and missing files."""
        spec = asdict(self.spec) | {"folder": str(self.spec.folder) if self.spec.folder else None}
        totals = {"parameters": self.parameters, "bytes": self.bytes}
        parts = [asdict(part) for part in self.parts]
        return {**spec, **totals, "parts": parts, "missing": list(self.missing)}


def find_local(model: str) -> ModelSpec:
    """The spec of a model, with its folder if it is on this disk (hub models: in the cache).

    Raises ModelError for an unknown name and for a folder that is not a model.
    """
    spec = find_spec(model)
    cached = find_cached(spec.repo) if spec.on_hub else None
    if cached is None or not (cached / "model_index.json").exists():
        return spec
    read = spec_of_folder(cached, name=spec.name, repo=spec.repo)
    return replace(read, description=spec.description, causal=spec.causal)


def inspect_model(model: str) -> ModelInfo:
    """Inspect a model, and its components if they are on this disk. Raises ModelError."""
    spec = find_local(model)
    if spec.folder is None:
        return ModelInfo(spec, _known_parts(spec))
    parts = tuple(_part(spec.folder, name, kind) for name, kind in _parts(spec.folder).items())
    return ModelInfo(spec, parts, tuple(missing_files(spec.folder)))


def _known_parts(spec: ModelSpec) -> tuple[Part, ...]:
    """The components of a Wan model that is not on this disk, from its architecture."""
    if not isinstance(spec.architecture, Architecture):
        return ()
    kinds = {**CLASSES, **dict.fromkeys(EXPERTS.values(), TASKS[spec.tasks[0]].transformer)}
    return tuple(
        Part(name, kinds[name], count, (), 0, part_config(spec.wan, name))
        for name, count in part_parameters(spec.wan, spec.experts).items()
    )


def missing_files(folder: Path) -> list[str]:
    """Names of the files that an interrupted download lacks; empty for a complete model."""
    if not (folder / "model_index.json").exists() and not (folder / "transformer").is_dir():
        return ["model_index.json"]
    missing = []
    for name in _parts(folder):
        part = folder / name
        if not part.is_dir() or not any(part.iterdir()):
            missing.append(name)
        elif (part / "config.json").exists():
            missing += [f"{name}/{path.name}" for path in _shards(part) if not path.exists()]
    return missing


def _parts(folder: Path) -> dict[str, str]:
    """Class names by component, in the order of model_index.json, those with weights first."""
    if not (folder / "model_index.json").exists():
        return {
            "transformer": read_config(folder, "transformer/config.json").get("_class_name", "")
        }
    index = read_config(folder, "model_index.json")
    named = {k: v[1] for k, v in index.items() if isinstance(v, list) and len(v) == 2 and v[0]}
    return dict(
        sorted(named.items(), key=lambda item: not (folder / item[0] / "config.json").exists())
    )


def _shards(part: Path) -> list[Path]:
    """The files of its weights, including missing ones."""
    shards: set[str] = set()
    for index in part.glob("*.safetensors.index.json"):
        try:
            shards |= set(map(str, dict(read_json(index)["weight_map"]).values()))
        except (OSError, ValueError, KeyError, TypeError):
            raise ModelError(f"cannot read {index}.", hint="copy that file again") from None
    files = sorted(part.glob("*.safetensors"))
    return [part / name for name in sorted(shards)] or files or [part / "*.safetensors"]


def _part(folder: Path, name: str, kind: str) -> Part:
    part = folder / name
    has_weights = (part / "config.json").exists()
    shards = [path for path in _shards(part) if path.exists()] if has_weights else []
    counts: dict[str, int] = {}
    for path in shards:
        for dtype, count in _tensors(path):
            counts[dtype] = counts.get(dtype, 0) + count
    return Part(
        name,
        kind,
        parameters=sum(counts.values()),
        dtypes=tuple(sorted(counts, key=lambda dtype: -counts[dtype])),
        bytes=sum(path.stat().st_size for path in shards),
        config=read_config(folder, f"{name}/config.json") if has_weights else {},
    )


def _tensors(path: Path) -> list[tuple[str, int]]:
    """Dtype (torch's name) and number of parameters of every tensor."""
    try:
        tensors = read_header(path).tensors.values()
    except (OSError, ValueError):
        raise broken_weights(path) from None
    return [(_DTYPES.get(stored.dtype, stored.dtype), prod(stored.shape)) for stored in tensors]
