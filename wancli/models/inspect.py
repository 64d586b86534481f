"""Inspect a model folder through its JSON files and the headers of its weights, without torch."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from wancli.catalog.file_names import expert_by_name, task_by_name
from wancli.catalog.hf_configs import CLASSES, part_config
from wancli.catalog.hub_cache import absent, cached_repos, find_cached
from wancli.catalog.local import (
    broken_weights,
    find_spec,
    indexed_shards,
    read_config,
    spec_of_folder,
)
from wancli.catalog.specs import RANDOM, SPECS, ModelSpec
from wancli.catalog.tasks import EXPERTS, TASKS, TEXT
from wancli.catalog.tiny_decoder import DECODER
from wancli.catalog.wan import Architecture
from wancli.catalog.weight_files import ARCHITECTURE, identify, models_of
from wancli.cost.wan import part_parameters
from wancli.errors import InputError, ModelError, UsageError, WancliError, some
from wancli.models.weight_summary import SIZE, summarize_weights
from wancli.planning.lora import check_lora_file
from wancli.planning.lora_keys import (
    PICKLES,
    LoraFile,
    changed_shapes,
    count_blocks,
    fitting_models,
    has_header,
    read_lora_file,
)
from wancli.utils.reading import DTYPE_NAMES, read_header


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
    return replace(read, description=spec.description, causal=spec.causal, clips=spec.clips)


def local_folder(model: str) -> tuple[ModelSpec, Path]:
    """The spec of a model, and its folder. Raises ModelError if it is not downloaded."""
    spec = spec_with_files(model)
    if spec.folder is not None:
        return spec, spec.folder
    cached = find_cached(spec.repo)
    if cached is None:
        raise absent(model)
    if missing := missing_files(cached):
        raise ModelError(
            f"model '{model}' is incomplete: it lacks {some(missing, most=3)}.",
            hint=f"wancli model pull {model}",
        )
    return spec, cached


def spec_with_files(model: str) -> ModelSpec:
    """The spec of a model. Raises UsageError for a random one, which has no files."""
    spec = find_spec(model)
    if spec.random:
        raise UsageError(
            f"model '{model}' has no files: its weights are random.",
            hint=f"the model itself: {model.removeprefix(RANDOM)}",
        )
    return spec


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
    shards = {
        path for index in part.glob("*.safetensors.index.json") for path in indexed_shards(index)
    }
    files = sorted(part.glob("*.safetensors"))
    return sorted(shards) or files or [part / "*.safetensors"]


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
    return [(DTYPE_NAMES.get(stored.dtype, stored.dtype), prod(stored.shape)) for stored in tensors]


@dataclass(frozen=True)
class LoraInfo:
    """What a LoRA is and which models it is for, as far as its keys and its name tell."""

    path: Path
    bytes: int
    keys: int
    layers: int
    form: str  # whose names its keys have, and what they hold
    ranks: Mapping[int, int]  # number of layers by rank, the most common first
    blocks: int  # of the transformer, up to the last one that it changes
    dim: int  # hidden size; 0 if no layer tells
    size: str  # 1.3B, 5B or 14B; "" if unknown
    task: str  # "" if neither keys nor name tell
    expert: str  # high or low, by its name; "" if that does not tell
    models: tuple[str, ...]  # known models whose layers it fits
    first_keys: tuple[str, ...]  # as in the file, where no known model fits

    @property
    def description(self) -> str:
        """In one line."""
        rank = f"rank {next(iter(self.ranks))}" if self.ranks else ""
        noise = self.expert and f"{self.expert} noise"
        return ", ".join(filter(None, (rank, self.size, self.task, noise)))

    def as_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self) | {"path": str(self.path)}


def inspect_lora(path: Path) -> LoraInfo:
    """Describe a LoRA by the header of its file. Raises InputError or ModelError for others."""
    check_lora_file(path)
    if not has_header(path):
        raise InputError(
            f"{path} is a pickle of an old format, without a header to read.",
            hint="`lora` takes it; its keys are counted as it loads",
        )
    lora = read_lora_file(path)
    models = tuple(fitting_models(lora))
    changes = (item for layer in lora.layers for item in changed_shapes(lora, layer))
    projections = (s for name, s in changes if re.match(r"blocks\..*attn\d\.to_", name))
    return LoraInfo(
        path,
        path.stat().st_size,
        len(lora.shapes),
        len(lora.layers),
        _form(lora),
        lora.ranks,
        count_blocks(lora.layers),
        next((shape[0] for shape in projections if shape), 0),
        _size_of(models),
        _task_of(path, models),
        expert_by_name(path),
        models,
        () if models else tuple(sorted(lora.shapes)[:3]),
    )


@dataclass(frozen=True)
class WeightsInfo:
    """Weights in one file: of which part they are, and of which models."""

    path: Path
    bytes: int
    kind: str  # as a GGUF names its architecture; "" for others
    part: str  # of a Wan, as the setting that takes it is called; "" for weights of another model
    keys: int
    parameters: int
    dtypes: Mapping[str, int]  # number of tensors by type, the most common first
    blocks: int  # of a transformer
    dim: int  # its hidden size
    size: str  # 1.3B, 5B or 14B; "" if unknown
    task: str  # "" if neither parameters nor name tell
    expert: str  # high or low, by its name; "" if that does not tell
    models: tuple[str, ...]  # known models whose transformer it fits

    def as_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self) | {"path": str(self.path)}


def inspect_weights(path: Path) -> WeightsInfo:
    """Describe weights in one file by its header. Raises InputError or ModelError."""
    part, keys = identify(path)
    tensors, shapes = keys.header.tensors.values(), keys.shapes
    models = tuple(models_of(shapes, part)) if part else ()
    if DECODER in (summary := summarize_weights(path)).parts:
        part, models = DECODER, summary.models
    dtypes = Counter(DTYPE_NAMES.get(stored.dtype, stored.dtype) for stored in tensors)
    return WeightsInfo(
        path,
        path.stat().st_size,
        keys.header.metadata.get(ARCHITECTURE, ""),
        part,
        len(tensors),
        sum(prod(stored.shape) for stored in tensors),
        dict(dtypes.most_common()),
        count_blocks(shapes),
        shapes["patch_embedding.bias"][0] if "patch_embedding.bias" in shapes else 0,
        _size_of(models) if part == "transformer" else "",
        _task_of(path, models) if part == "transformer" else "",
        expert_by_name(path) if part == "transformer" else "",
        models,
    )


_PREFIXES = {
    "lora_": "kohya",
    "diffusion_model.": "ComfyUI",
    "base_model.model.": "peft",
    "transformer.": "diffusers",
}


def _form(lora: LoraFile) -> str:
    """Whose prefix the keys have, and what they hold."""
    first = next(key for keys in lora.layers.values() for key in keys.values())
    whose = next((name for prefix, name in _PREFIXES.items() if first.startswith(prefix)), "bare")
    held = {kind for keys in lora.layers.values() for kind in keys}
    kinds = ("up", "alpha", "up_bias", "diff", "diff_b")
    words = [{"up": "factors"}.get(kind, kind) for kind in kinds if kind in held]
    return f"{whose} names; {', '.join(words)}"


def _size_of(models: Sequence[str]) -> str:
    """1.3B, 5B or 14B, from the first name of a model that says it."""
    sizes = (re.search(SIZE, model) for model in models)
    return next((f"{size[1]}B" for size in sizes if size), "")


def _task_of(path: Path, models: Sequence[str]) -> str:
    """The task by the models that a file fits, else by its name; "" if neither tells."""
    if models and not any(TEXT in SPECS[model].tasks for model in models):
        return SPECS[models[0]].tasks[0]
    return task_by_name(path)


def cached_loras() -> list[tuple[str, str, Path]]:
    """REPO:FILE, repository and path of every LoRA in the hub's cache."""
    loras = []
    for repo in cached_repos():
        folder = find_cached(repo)
        if folder is None or (folder / "model_index.json").exists():
            continue
        for path in sorted(folder.rglob("*.*")):
            if path.suffix not in (".safetensors", *PICKLES):
                continue
            try:
                read_lora_file(path)
            except WancliError:  # another kind of model
                continue
            loras.append((f"{repo}:{path.relative_to(folder).as_posix()}", repo, path))
    return loras
