"""Convert a Wan checkpoint to a diffusers folder; nothing is written unless every key matches."""

import inspect
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError
from safetensors.torch import save_file

from wancli.catalog.wan_layers import EMBEDDER, IMAGE
from wancli.errors import InputError, ModelError, closest, first_line, some
from wancli.models.checkpoint import Tensors, read_checkpoint
from wancli.models.convert_folder import check_base, check_target, copy_parts
from wancli.models.lora import merge_weights
from wancli.planning.lora import Lora
from wancli.utils.files import whole_folder
from wancli.utils.reading import read_json, unreadable

Shapes = Mapping[str, tuple[int, ...]]

_HEAD_WIDTH, _SMALLEST_RELEASED = 128, 1024  # every released Wan is this wide, and wider
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The tensors that sizes are read from, and their number of dimensions.
_PATCH, _TEXT, _TIME, _FFN, _OUT = _SIZED = {
    "patch_embedding.weight": 5,
    f"{EMBEDDER}.text_embedder.linear_1.weight": 2,
    f"{EMBEDDER}.time_embedder.linear_1.weight": 2,
    "blocks.0.ffn.net.0.proj.weight": 2,
    "proj_out.weight": 2,
}
_ORIGINAL = {
    "num_heads": "num_attention_heads",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
}
# Config entries that no shape determines.
_NOT_IN_SHAPES: dict[str, type[int] | type[float]] = {
    "num_attention_heads": int,
    "attention_head_dim": int,
    "rope_max_seq_len": int,
    "eps": float,
}
# Entries of the original config that are settings of a run, not of the architecture.
_RUN_SETTINGS = {"model_type", "text_len", "window_size", "local_attn_size", "sink_size"}
_HEADS_HINT = '`config` FILE.json with {"num_heads": 4}'


@dataclass(frozen=True)
class ConvertedModel:
    """A converted folder: number of parameters, their dtypes, and diffusers' config."""

    path: Path
    parameters: int
    dtype: str
    config: dict[str, Any]


def convert(  # noqa: PLR0913 - the flags of `wancli model convert`
    source: Path,
    out: Path,
    *,
    config: Path | None = None,
    base: Path | None = None,
    entry: str = "",
    loras: Sequence[Lora] = (),
    overwrite: bool = False,
) -> ConvertedModel:
    """Write the checkpoint `source` to `out`/transformer under diffusers' names.

    Values are unchanged, but for `loras`, which are merged. `config` is a JSON file with what
    shapes do not determine, such as the number of heads. The other components of the model folder
    `base` are added, as hard links where possible. Of a pickle with several state dicts, `entry`
    names the one to convert.

    Raises UsageError if `out` must not be replaced, InputError for an unreadable file, ModelError
    for keys or sizes that do not match, OutputError if writing fails.
    """
    sources = [path for path in (source, config, base) if path]
    check_target(out, sources=sources, overwrite=overwrite)
    stated = _read_stated(config) if config else {}
    tensors = read_checkpoint(source, entry)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    with torch.device("meta"):
        model = WanTransformer3DModel(**read_sizes(shapes, stated, source))
    _check_tensors(tensors, model, source)
    merge_weights(tensors, loras, source.name)
    sizes = {name: value for name, value in model.config.items() if not name.startswith("_")}
    if base:
        check_base(base, sizes)
    with whole_folder(out, hint="use another folder", overwrite=overwrite) as part:
        _save(tensors, model, part / "transformer")
        if base:
            copy_parts(base, part)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return ConvertedModel(out, parameters, ", ".join(dtypes), sizes)


def _save(tensors: Tensors, model: WanTransformer3DModel, folder: Path) -> None:
    model.save_config(folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    packed = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(packed, weights, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(first_line(error)) from error
    shutil.copymode(folder / "config.json", weights)  # safetensors writes mode 0600


def _check_tensors(tensors: Tensors, model: WanTransformer3DModel, source: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - expected.keys()),
        "of another shape": [
            f"{name} {list(tensors[name].shape)}, not {list(shape)}"
            for name, shape in sorted(expected.items())
            if name in tensors and tensors[name].shape != shape
        ],
        "of another type": [
            f"{name} {tensor.dtype}"
            for name, tensor in sorted(tensors.items())
            if tensor.dtype not in _DTYPES
        ],
    }
    if reasons := [f"{kind}: {some(names)}" for kind, names in problems.items() if names]:
        raise ModelError(
            f"{source} is not a complete Wan transformer; keys {'; '.join(reasons)}.",
            hint="give a complete checkpoint: LoRAs merged, not quantized, no other variant",
        )


def read_sizes(shapes: Shapes, stated: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Infer diffusers' config from the shapes of a checkpoint. Raises ModelError.

    `stated` (diffusers' names, or `dim`) adds what shapes do not determine; it must not contradict
    them.
    """
    lost = [n for n, ndim in _SIZED.items() if len(shapes.get(n, ())) != ndim or 0 in shapes[n]]
    if lost:
        raise ModelError(
            f"{source} is not a Wan transformer; keys missing or of another shape: {some(lost)}.",
            hint="give a Wan checkpoint",
        )
    dim = shapes[_PATCH][0]
    heads = _heads(dim, stated, source)
    sizes = _sizes(shapes) | {"num_attention_heads": heads, "attention_head_dim": dim // heads}
    for name, value in stated.items():
        inferred = (sizes | {"dim": dim}).get(name, value)
        if value != inferred:
            raise ModelError(
                f"`config` has {name} {value}, but {source} has {inferred}.",
                hint=f"remove {name} from `config`",
            )
    return sizes | {name: stated[name] for name in _NOT_IN_SHAPES if name in stated}


def _sizes(shapes: Shapes) -> dict[str, Any]:
    """The entries of diffusers' config that shapes determine."""
    patch = shapes[_PATCH][2:]
    numbers = (int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name)))
    image = _any(shapes, rf"{IMAGE}\.norm1\.(weight|bias)")
    position = shapes.get(f"{IMAGE}.pos_embed")
    added = _any(shapes, r"blocks\.\d+\.attn2\.add_[kv]_proj\.weight")
    return {
        "patch_size": list(patch),
        "in_channels": shapes[_PATCH][1],
        "out_channels": shapes[_OUT][0] // math.prod(patch),
        "text_dim": shapes[_TEXT][1],
        "freq_dim": shapes[_TIME][1],
        "ffn_dim": shapes[_FFN][0],
        "num_layers": min(1 + max(numbers), len(shapes)),  # bounded: every layer has a key
        "cross_attn_norm": _any(shapes, r"blocks\.\d+\.norm2\.(weight|bias)") is not None,
        "qk_norm": "rms_norm_across_heads",
        "image_dim": image[-1] if image else None,
        "added_kv_proj_dim": added[-1] if added else None,
        "pos_embed_seq_len": position[1] if position and len(position) == 3 else None,
    }


def _any(shapes: Shapes, pattern: str) -> tuple[int, ...] | None:
    """The shape of any tensor whose name matches; missing ones are reported by the key check."""
    return next((shape for name, shape in shapes.items() if re.fullmatch(pattern, name)), None)


def _heads(dim: int, stated: Mapping[str, Any], source: Path) -> int:
    """The number of attention heads. Raises ModelError."""
    released = dim >= _SMALLEST_RELEASED and dim % _HEAD_WIDTH == 0
    width = stated.get("attention_head_dim", _HEAD_WIDTH if released else None)
    heads: int | None = stated.get("num_attention_heads", width and dim // width)
    if heads is None:
        raise ModelError(
            f"{source} has dim {dim}, but does not record how many attention heads.",
            hint=_HEADS_HINT,
        )
    if heads == 0 or dim % (2 * heads):  # rotary embeddings rotate pairs
        raise ModelError(
            f"{source} has dim {dim}, which cannot be split over {heads} heads.", hint=_HEADS_HINT
        )
    return heads


def _read_stated(path: Path) -> dict[str, Any]:
    """Read the sizes in a config, under diffusers' names, and `dim`. Raises InputError."""
    stated: dict[str, Any] = {}
    for key, value in _read_json(path).items():
        name = _ORIGINAL.get(key, key)
        if name.startswith("_") or name in _RUN_SETTINGS:
            continue
        if name == "qk_norm" and value is True:  # the original has this one only
            value = "rms_norm_across_heads"
        _check_stated(name, value, path)
        if stated.setdefault(name, value) != value:
            raise InputError(
                f"{path} sets {name} twice, to different values.", hint=f"remove {key}"
            )
    return stated


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise unreadable(path, error, hint=_HEADS_HINT) from None


def _check_stated(name: str, value: Any, path: Path) -> None:
    known = {"dim", *_ORIGINAL, *inspect.signature(WanTransformer3DModel).parameters}
    if name not in known:
        near = closest(name, known)
        raise InputError(
            f"{path} has an unknown key '{name}'.",
            hint=f"did you mean '{near}'?" if near else f"known: {', '.join(sorted(known))}",
        )
    kind = _NOT_IN_SHAPES.get(name)
    if kind and not (type(value) is kind and value > 0):
        raise InputError(
            f"{path}: {name} {value!r} is invalid.",
            hint=f"a positive {kind.__name__}, as in 4 or 1e-6",
        )
