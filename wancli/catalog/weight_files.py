"""Weights of a part in one file, safetensors or GGUF, in any naming, checked by its header.

Read are the naming of Wan's code and that of diffusers, bare or under a prefix, as in ComfyUI's
files (`model.diffusion_model.`). Weights in fp8 may have scales, by which they are multiplied:
`scale_weight` or `weight_scale`, as ComfyUI and LightX2V write them. Without any, fp8 values are
the weights, as in ComfyUI. Scales of activations are not used.

GGUF files have Wan's names, as ComfyUI-GGUF's tools/convert.py writes them (795e451 of
https://github.com/city96/ComfyUI-GGUF), and llama.cpp's for the text encoder. Quantized weights of
linear layers stay so in memory; any others are dequantized as they load.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from wancli.catalog.model_folders import find_file, find_named
from wancli.catalog.part_names import text_encoder_name, text_encoder_parameters, vae_name
from wancli.catalog.specs import SPECS, ModelSpec, PackedWeights, WeightFile
from wancli.catalog.tasks import EXPERTS, of_expert, setting_of
from wancli.catalog.wan import Architecture, Autoencoder
from wancli.catalog.wan_layers import (
    Shape,
    Shapes,
    parameter_names,
    strip_wrappers,
    wan_parameters,
)
from wancli.catalog.wan_vae_layers import vae_parameters
from wancli.errors import InputError, ModelError, PlanError, SettingsError, missing, some
from wancli.utils.gguf import QUANTIZED, is_gguf, read_gguf_header
from wancli.utils.reading import Header, Stored, open_file, read_header, unreadable

_PREFIX = {
    "transformer": re.compile(r"(?:model\.)?(?:diffusion_model\.)?|transformer\."),
    "vae": re.compile(r"vae\.|first_stage_model\."),
    "text_encoder": re.compile(r"(?:text_encoders\.umt5xxl\.)?(?:transformer\.)?"),
}
# Prefixes of a file that may hold the other parts, too.
_WHOLE = {
    "transformer": ("model.diffusion_model.",),
    "vae": ("vae.", "first_stage_model."),
    "text_encoder": ("text_encoders.umt5xxl.",),
}
_SCALE = re.compile(r"(.+)\.(?:scale_weight|weight_scale)")
_UNUSED = re.compile(
    r"(?:.+\.)?(?:scale_input|input_scale|comfy_quant|scaled_fp8|spiece_model|encoder\.embed_tokens\.weight)"
)
_MARKS = ("scaled_fp8", "comfy_quant")  # keys by which a file says that its fp8 has scales
_FP8 = ("F8_E4M3", "F8_E5M2")
_FLOATS = ("F32", "F16", "BF16", *_FP8)
# Types that diffusers dequantizes: diffusers/quantizers/gguf/utils.py of 0.42.1.
GGUF_TYPES = (
    "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "Q3_K", "Q2_K", "IQ4_NL",
    "IQ4_XS",
)  # fmt: skip
# A parameter that every such part has, by the library's name.
_SIGNS = {
    "transformer": "blocks.0.attn1.to_q.weight",
    "text_encoder": "encoder.block.0.layer.0.SelfAttention.q.weight",
    "vae": "post_quant_conv.weight",
}
ARCHITECTURE = "general.architecture"  # the key in a GGUF's metadata
_IN_BLOCK = re.compile(r"(?:(?:vace_)?blocks|encoder\.block)\.\d+(?=\.)")
# Parameters that ggml stores without their first axis of 1, and their real number of axes.
_SHORTENED, _AXES = ("scale_shift_table", "pos_embed"), 3
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
        return {name: _shape(name, self.header.tensors[key]) for name, key in self.stored.items()}

    def packed(self) -> dict[str, Stored]:
        """The weights that stay quantized in memory: matrices of linear layers.

        Not those of modules that diffusers keeps in float32, and no embeddings.
        """
        tensors = {name: self.header.tensors[key] for name, key in self.stored.items()}
        return {name: stored for name, stored in tensors.items() if _stays_packed(name, stored)}


def block_of(name: str) -> str:
    """The block that a parameter is in; "" if it is in none."""
    match = _IN_BLOCK.match(name)
    return match[0] if match else ""


def _shape(name: str, stored: Stored) -> Shape:
    missing_axes = _AXES - len(stored.shape) if name.endswith(_SHORTENED) else 0
    return (1,) * missing_axes + stored.shape


def _stays_packed(name: str, stored: Stored) -> bool:
    wide = re.search(r"(?:^|\.)(?:time_embedder|norm\d|scale_shift_table)\.", name)
    linear = len(stored.shape) == 2 and name.endswith(".weight")
    embedding = name.endswith(("shared.weight", "relative_attention_bias.weight"))
    return stored.dtype in QUANTIZED and linear and not wide and not embedding


def add_weight_files(
    spec: ModelSpec, texts: Sequence[str] = (), *, vae: str = "", text_encoder: str = ""
) -> ModelSpec:
    """The spec with the weights in FILE, or FILE@high and FILE@low, for its transformers.

    The VAE and the text encoder may have a file, too.

    Raises InputError for a file that is missing or broken, ModelError for weights of another
    model, PlanError for a wrong expert.
    """
    files: dict[str, WeightFile] = {}
    for text in texts:
        name, expert = of_expert(text)
        check_expert(spec, "transformer", name, expert)
        part = EXPERTS[expert or "high"]
        if part in files:
            raise SettingsError(
                f"`transformer {text}`: {part} has a file already.", hint="give one for each"
            )
        files[part] = read_weight_file(find_file("transformer", name), spec, part)
    for part, name in (("vae", vae), ("text_encoder", text_encoder)):
        if name:
            files[part] = read_weight_file(find_file(part, name), spec, part)
    return replace(spec, files=tuple(files.values()))


def check_expert(spec: ModelSpec, setting: str, file: str | Path, expert: str) -> None:
    """Raise PlanError unless a file is said to be for one of two experts, where there are two."""
    if spec.experts > 1 and not expert:
        raise PlanError(
            f"`{setting} {file}` does not say which of {spec.name}'s two experts it is for.",
            hint=f"`{setting}` {file}@high, and one @low",
        )
    if spec.experts < 2 and expert:
        raise PlanError(
            f"`{setting}` {file}@{expert}: {spec.name} has one expert.", hint=f"`{setting} {file}`"
        )


def read_weight_file(path: Path, spec: ModelSpec, part: str) -> WeightFile:
    """Check a file against a part of a model. Raises InputError or ModelError."""
    if not path.is_file():
        raise missing("file", path)
    keys = read_weight_keys(path, spec, part)
    architecture = spec.architecture
    if isinstance(architecture, Architecture):
        if part in EXPERTS.values():
            _refuse_unless(not architecture.transformer.face, path, spec, part)
        check_keys(path, keys, spec, part, _parameters(architecture, setting_of(part)))
    else:
        _refuse_unless(architecture is None, path, spec, part)
    tensors = [keys.header.tensors[key] for key in keys.stored.values()]
    packed: dict[str, PackedWeights] = {}
    for name, stored in keys.packed().items():
        block = block_of(name)
        before = packed.get(block, PackedWeights(block))
        packed[block] = before.plus(prod(stored.shape), stored.end - stored.begin)
    digest, count = _digest(path, keys.header), len(keys.header.tensors)
    file = WeightFile.of(part, path, digest=digest, keys=count, tensors=tensors)
    return replace(file, scales=len(keys.scales), packed=tuple(packed.values()))


def _refuse_unless(condition: bool, path: Path, spec: ModelSpec, part: str) -> None:  # noqa: FBT001
    if not condition:
        setting = setting_of(part)
        raise PlanError(
            f"`{setting} {path}`: {spec.name} does not take its {part} from one file.",
            hint=f"drop `{setting}`",
        )


def read_weight_keys(path: Path, spec: ModelSpec, part: str) -> WeightKeys:
    """Read the header of a file, and sort the keys of a part. Raises InputError or ModelError."""
    header, kind = read_weight_header(path), setting_of(part)
    known = isinstance(spec.architecture, Architecture)
    return _sort_keys(path, header, kind, spec.wan.vae if known else Autoencoder())


def identify(path: Path) -> tuple[str, WeightKeys]:
    """The part of a Wan whose weights a file holds, by its header; "" if it is of another model.

    Raises InputError or ModelError for a broken file.
    """
    header = read_weight_header(path)
    for kind, sign in _SIGNS.items():
        keys = _sort_keys(path, header, kind, Autoencoder())
        if sign in keys.stored:
            return kind, keys
    return "", WeightKeys(header, {}, {})


def read_weight_header(path: Path) -> Header:
    """The header of a safetensors or GGUF file. Raises InputError."""
    try:
        return _read_header(path)
    except (OSError, ValueError) as error:
        hint = "give a .safetensors or .gguf file, or copy it again"
        raise unreadable(path, error, hint=hint) from None


def _read_header(path: Path) -> Header:
    gguf = path.suffix == ".gguf" or is_gguf(path)
    return read_gguf_header(path) if gguf else read_header(path)


def _sort_keys(path: Path, header: Header, kind: str, vae: Autoencoder) -> WeightKeys:
    own = [key for key in header.tensors if key.startswith(_WHOLE[kind])]
    keys = own or list(header.tensors)
    marked = any(key.endswith(_MARKS) for key in keys)
    used = (key for key in keys if not _UNUSED.fullmatch(key))
    bare = {key: _PREFIX[kind].sub("", strip_wrappers(key), count=1) for key in used}
    scale_of = {
        key: f"{m[1]}.weight" for key, name in bare.items() if (m := _SCALE.fullmatch(name))
    }
    names = _names([bare[key] for key in bare.keys() - scale_of.keys()], path, kind, vae)
    stored = {names[name]: key for key, name in bare.items() if key not in scale_of}
    scales = {names.get(name, name): key for key, name in scale_of.items()}
    _check_scales(path, header, stored, scales, marked=marked)
    return WeightKeys(header, stored, scales)


def _names(names: Sequence[str], path: Path, kind: str, vae: Autoencoder) -> Mapping[str, str]:
    """The library's name of each parameter of a part."""
    if kind == "transformer":
        return parameter_names(names, path)
    if kind == "text_encoder":
        return {name: text_encoder_name(name) for name in names}
    return {name: vae_name(name, res_blocks=vae.res_blocks) for name in names}


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
    hint = "a file with one scale for each weight or row, in bf16, or GGUF" if misfits else ""
    if reasons := [f"{kind}: {some(names)}" for kind, names in problems.items() if names]:
        raise ModelError(f"{path} has {'; '.join(reasons)}.", hint=hint or "copy that file again")


def _is_scale(header: Header, key: str, *, of: str) -> bool:
    """Whether a tensor is one float, or one for each row of a weight."""
    scale, weight = header.tensors[key], header.tensors[of]
    return scale.dtype in _FLOATS and prod(scale.shape) in (1, *weight.shape[:1])


def check_keys(
    path: Path, keys: WeightKeys, spec: ModelSpec, part: str, expected: Mapping[str, Shape]
) -> None:
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
    }
    if reasons := [f"{kind}: {some(names)}" for kind, names in problems.items() if names]:
        what = setting_of(part)
        if known := models_of(shapes, what):
            raise ModelError(
                f"{path} is not the {what} of {spec.name}, but of another model.",
                hint=f"it fits {some(known)}",
            )
        if not expected.keys() & shapes.keys():
            named = keys.header.metadata.get(ARCHITECTURE)
            kind = f": it is of the kind {named}" if named else ""
            raise ModelError(
                f"{path} holds no {what.replace('_', ' ')} of a Wan{kind}.",
                hint=f"wancli model info {path} says what it holds",
            )
        raise ModelError(
            f"{path} is not the {what} of {spec.name}; keys {'; '.join(reasons)}.",
            hint=f"give the whole {what}, of this model",
        )
    _check_dtypes(path, keys)


def _check_dtypes(path: Path, keys: WeightKeys) -> None:
    """Raise ModelError for weights of a type that is not read, such as int8 or NVFP4."""
    dtypes = {key: keys.header.tensors[key].dtype for key in sorted(keys.stored.values())}
    if unread := [f"{key} {it}" for key, it in dtypes.items() if it not in _FLOATS + GGUF_TYPES]:
        raise ModelError(
            f"{path} has weights of a dtype that is not read: {some(unread)}.",
            hint="a file in fp8, in 16 or 32 bits, or GGUF",
        )


def models_of(shapes: Shapes, kind: str) -> list[str]:
    """Names of the known models whose part of this kind has exactly these parameters."""
    return [
        spec.name
        for spec in SPECS.values()
        if isinstance(spec.architecture, Architecture)
        and _parameters(spec.architecture, kind) == shapes
    ]


def _parameters(architecture: Architecture, kind: str) -> Shapes:
    """Names and shapes of a part's parameters, in the libraries' naming."""
    if kind == "vae":
        return vae_parameters(architecture.vae)
    if kind == "text_encoder":
        return text_encoder_parameters(architecture.text_encoder)
    return wan_parameters(architecture.transformer)


def _digest(path: Path, header: Header) -> str:
    """Digest of a file's header and of the beginning of each tensor: it reads 5 MB of 28 GB."""
    digest = hashlib.sha256()
    try:
        with open_file(path) as file:
            file.seek(8)  # both kinds of file begin with what is always the same, or a length
            digest.update(file.read(header.start - 8))
            for stored in header.tensors.values():
                file.seek(header.start + stored.begin)
                digest.update(file.read(min(_SAMPLE, stored.end - stored.begin)))
    except OSError as error:
        raise unreadable(path, error, hint="check that file") from None
    return digest.hexdigest()[:16]


def weights_json(spec: ModelSpec) -> list[dict[str, Any]]:
    """The files of a model as a request stores them."""
    return [
        {
            **asdict(replace(file, packed=())),
            "path": str(file.path.absolute()),
            "name": file.path.name,
        }
        for file in spec.files
    ]


def find_recorded(weights: Sequence[Mapping[str, Any]], record: Path) -> dict[str, Any]:
    """The settings for the files of a record, by their digest.

    Each is at its old path, beside the record or, by its name, in WANCLI_MODEL_PATH.

    Raises InputError for one that is missing or has changed.
    """
    several = any(entry["part"] == EXPERTS["low"] for entry in weights)
    experts = {part: f"@{expert}" for expert, part in EXPERTS.items()} if several else {}
    files = {
        entry["part"]: f"{_find(entry, record)}{experts.get(entry['part'], '')}"
        for entry in weights
    }
    transformers = tuple(files.pop(part) for part in EXPERTS.values() if part in files)
    return files | ({"transformer": transformers} if transformers else {})


def _find(entry: Mapping[str, Any], record: Path) -> Path:
    name = str(entry["name"])
    beside = record.parent / name
    named = find_named(setting_of(entry["part"]), name)
    for path in (Path(entry.get("path") or beside), beside, *named):
        try:
            if _digest(path, _read_header(path)) == entry["digest"]:
                return path
        except (OSError, ValueError):
            continue
    raise InputError(
        f"{record} was made with {name}, which is missing or has changed.",
        hint=f"put the original {name} beside it, or give `{setting_of(entry['part'])}` FILE",
    )
