"""A transformer's weights in one safetensors file, in any naming, checked by its header.

Read are the naming of Wan's code and that of diffusers, bare or under a prefix, as in ComfyUI's
files (`model.diffusion_model.`). Weights in fp8 may have scales, by which they are multiplied:
`scale_weight` or `weight_scale`, as ComfyUI and LightX2V write them. Without any, fp8 values are
the weights, as in ComfyUI. Scales of activations are not used.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from wancli.catalog.specs import SPECS, ModelSpec, WeightFile
from wancli.catalog.tasks import EXPERTS, of_expert
from wancli.catalog.wan import Architecture
from wancli.catalog.wan_layers import Shape, parameter_names, strip_wrappers, wan_parameters
from wancli.errors import InputError, ModelError, PlanError, SettingsError, missing, some
from wancli.utils.reading import Header, open_file, read_header, unreadable, user_path

_PREFIX = re.compile(r"(?:model\.)?(?:diffusion_model\.)?|transformer\.")
_WHOLE = "model.diffusion_model."  # of a file that may hold the other parts, too
_SCALE = re.compile(r"(.+)\.(?:scale_weight|weight_scale)")
_UNUSED = re.compile(r"(?:.+\.)?(?:scale_input|input_scale|comfy_quant|scaled_fp8)")
_FP8 = ("F8_E4M3", "F8_E5M2")
_FLOATS = ("F32", "F16", "BF16", *_FP8)
_HINT = "give the file of a whole transformer: .safetensors, LoRAs merged, no other variant"
_SAMPLE = 4096  # bytes of each tensor in a digest


@dataclass(frozen=True)
class WeightKeys:
    """Where a file has each parameter, by diffusers' name, and the scales of those in fp8."""

    header: Header
    stored: Mapping[str, str]
    scales: Mapping[str, str]

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shape of every parameter."""
        return {name: self.header.tensors[key].shape for name, key in self.stored.items()}


def add_weight_files(spec: ModelSpec, texts: Sequence[str]) -> ModelSpec:
    """The spec with the weights in FILE, or FILE@high and FILE@low, for its transformers.

    Raises InputError for a file that is missing or broken, ModelError for weights of another
    model, PlanError for a wrong expert.
    """
    files: dict[str, WeightFile] = {}
    for text in texts:
        name, expert = of_expert(text)
        _check_expert(spec, name, expert)
        part = EXPERTS[expert or "high"]
        if part in files:
            raise SettingsError(
                f"`transformer {text}`: {part} has a file already.", hint="give one for each"
            )
        files[part] = read_weight_file(user_path(name), spec, part)
    return replace(spec, files=tuple(files.values()))


def _check_expert(spec: ModelSpec, name: str, expert: str) -> None:
    if spec.experts > 1 and not expert:
        raise PlanError(
            f"`transformer {name}` does not say which of {spec.name}'s two experts it is.",
            hint=f"`transformer` {name}@high, and another file @low",
        )
    if spec.experts < 2 and expert:
        raise PlanError(
            f"`transformer` {name}@{expert}: {spec.name} has one expert.",
            hint=f"`transformer {name}`",
        )


def read_weight_file(path: Path, spec: ModelSpec, part: str) -> WeightFile:
    """Check a file against the transformer of a model. Raises InputError or ModelError."""
    if not path.is_file():
        raise missing("file", path)
    keys = read_weight_keys(path)
    architecture = spec.architecture
    if isinstance(architecture, Architecture) and not architecture.transformer.face:
        _check_keys(path, keys, spec.name, wan_parameters(architecture.transformer))
    elif architecture:
        raise PlanError(
            f"`transformer {path}`: {spec.name} does not take its transformer from one file.",
            hint="give a Wan model that is not Wan-Animate",
        )
    tensors = [keys.header.tensors[key] for key in keys.stored.values()]
    dtypes = Counter(tensor.dtype for tensor in tensors)
    return WeightFile(
        part,
        path,
        digest=_digest(path, keys.header),
        keys=len(keys.header.tensors),
        parameters=sum(prod(tensor.shape) for tensor in tensors),
        bytes=sum(tensor.end - tensor.begin for tensor in tensors),
        dtypes=tuple(dtype for dtype, _ in dtypes.most_common()),
        scales=len(keys.scales),
    )


def read_weight_keys(path: Path) -> WeightKeys:
    """Read the header of a file, and sort its keys. Raises InputError or ModelError."""
    try:
        header = read_header(path)
    except (OSError, ValueError) as error:
        raise unreadable(path, error, hint="give a .safetensors file, or copy it again") from None
    keys = [key for key in header.tensors if key.startswith(_WHOLE)] or list(header.tensors)
    marked = any(key.endswith("scaled_fp8") for key in keys)
    bare = {key: _bare(key) for key in keys if not _UNUSED.fullmatch(key)}
    scale_of = {
        key: f"{m[1]}.weight" for key, name in bare.items() if (m := _SCALE.fullmatch(name))
    }
    names = parameter_names([bare[key] for key in bare.keys() - scale_of.keys()], path)
    stored = {names[name]: key for key, name in bare.items() if key not in scale_of}
    scales = {names.get(name, name): key for key, name in scale_of.items()}
    _check_scales(path, header, stored, scales, marked=marked)
    return WeightKeys(header, stored, scales)


def _bare(key: str) -> str:
    """A key without wrappers and prefix."""
    return _PREFIX.sub("", strip_wrappers(key), count=1)


def _check_scales(
    path: Path, header: Header, stored: Mapping[str, str], scales: Mapping[str, str], *,
    marked: bool,
) -> None:  # fmt: skip
    """Raise ModelError unless each scale has its weight and, if the file has any, the reverse."""
    tensors = header.tensors
    fp8 = {name for name, key in stored.items() if tensors[key].dtype in _FP8}
    lacking = sorted(fp8 - scales.keys()) if scales or marked else []
    lost = sorted(scales[name] for name in scales.keys() - stored.keys())
    misfits = sorted(
        f"{key} {[*tensors[key].shape]} {tensors[key].dtype}"
        for name, key in scales.items()
        if name in stored and not _is_scale(header, key, of=stored[name])
    )
    problems = {
        "fp8 weights without their scale": lacking,
        "scales without their weight": lost,
        "scales of another kind": misfits,
    }
    if reasons := [f"{kind}: {some(names)}" for kind, names in problems.items() if names]:
        raise ModelError(f"{path} has {'; '.join(reasons)}.", hint="copy that file again")


def _is_scale(header: Header, key: str, *, of: str) -> bool:
    """Whether a tensor is one float, or one for each row of a weight."""
    scale, weight = header.tensors[key], header.tensors[of]
    return scale.dtype in _FLOATS and prod(scale.shape) in (1, *weight.shape[:1])


def _check_keys(path: Path, keys: WeightKeys, model: str, expected: Mapping[str, Shape]) -> None:
    """Raise ModelError, with all that is wrong, unless the file holds exactly these parameters."""
    shapes = keys.shapes
    problems = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unexpected": sorted(keys.stored[name] for name in shapes.keys() - expected.keys()),
        "of another shape": [
            f"{keys.stored[name]} {[*shapes[name]]}, not {[*shape]}"
            for name, shape in sorted(expected.items())
            if shapes.get(name, shape) != shape
        ],
        "of a dtype that is not read": [
            f"{key} {keys.header.tensors[key].dtype}"
            for key in sorted(keys.stored.values())
            if keys.header.tensors[key].dtype not in _FLOATS
        ],
    }
    if reasons := [f"{kind}: {some(names)}" for kind, names in problems.items() if names]:
        known = models_of(shapes)
        raise ModelError(
            f"{path} is not the transformer of {model}; keys {'; '.join(reasons)}.",
            hint=f"it fits {', '.join(known)}" if known else _HINT,
        )


def models_of(shapes: Mapping[str, Shape]) -> list[str]:
    """Names of the known models whose transformer has exactly these parameters."""
    return [
        spec.name
        for spec in SPECS.values()
        if isinstance(spec.architecture, Architecture)
        and wan_parameters(spec.architecture.transformer) == shapes
    ]


def _digest(path: Path, header: Header) -> str:
    """Digest of a file's header and of the beginning of each tensor: it reads 5 MB of 28 GB."""
    digest = hashlib.sha256()
    try:
        with open_file(path) as file:
            length = int.from_bytes(file.read(8), "little")
            digest.update(file.read(length))
            for stored in header.tensors.values():
                file.seek(8 + length + stored.begin)
                digest.update(file.read(min(_SAMPLE, stored.end - stored.begin)))
    except OSError as error:
        raise unreadable(path, error, hint="check that file") from None
    return digest.hexdigest()[:16]


def weights_json(spec: ModelSpec) -> list[dict[str, Any]]:
    """The files of a model as a request stores them."""
    return [
        {**asdict(file), "path": str(file.path.absolute()), "name": file.path.name}
        for file in spec.files
    ]


def find_recorded(weights: Sequence[Mapping[str, Any]], record: Path) -> tuple[str, ...]:
    """The setting for the files of a record: at their old path or beside it, by their digest.

    Raises InputError for one that is missing or has changed.
    """
    several = len({entry["part"] for entry in weights} | {"transformer"}) > 1
    experts = {part: f"@{expert}" for expert, part in EXPERTS.items()} if several else {}
    return tuple(f"{_find(entry, record)}{experts.get(entry['part'], '')}" for entry in weights)


def _find(entry: Mapping[str, Any], record: Path) -> Path:
    name = str(entry["name"])
    beside = record.parent / name
    for path in (Path(entry.get("path") or beside), beside):
        try:
            if _digest(path, read_header(path)) == entry["digest"]:
                return path
        except (OSError, ValueError):
            continue
    raise InputError(
        f"{record} was made with `transformer` {name}, which is missing or has changed.",
        hint=f"put the original {name} beside it, or give `transformer` FILE",
    )
