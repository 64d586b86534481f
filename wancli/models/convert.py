"""Wan checkpoints in their authors' names, made into diffusers folders: every key, or none.

Names: the original model's are those of wan/modules/model.py of https://github.com/Wan-Video/Wan2.1
(9737cba); scripts/convert_wan_to_diffusers.py of https://github.com/huggingface/diffusers (58eb52c)
pairs them with diffusers'. Checkpoints of https://github.com/guandeh17/Self-Forcing (33593df) hold
`generator_ema`, `generator`, or both, whose keys start with what FSDP and the trainer put around.
"""

import json
import math
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from wancli.errors import InputError, ModelError, closest
from wancli.models.folder import check_base, check_target, copy_parts, whole_folder

Tensors = dict[str, torch.Tensor]

_GENERATORS = ("generator_ema", "generator")  # the smoothed weights are the published ones
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
_EMBEDDER = "condition_embedder"
_IMAGE = f"{_EMBEDDER}.image_embedder"
# In this order: later pairs meet what earlier ones left.
_RENAMES = (
    ("time_embedding.0", f"{_EMBEDDER}.time_embedder.linear_1"),
    ("time_embedding.2", f"{_EMBEDDER}.time_embedder.linear_2"),
    ("text_embedding.0", f"{_EMBEDDER}.text_embedder.linear_1"),
    ("text_embedding.2", f"{_EMBEDDER}.text_embedder.linear_2"),
    ("time_projection.1", f"{_EMBEDDER}.time_proj"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
    ("modulation", "scale_shift_table"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    # The original numbers its norms by age, diffusers by use: 2 and 3 change places.
    ("norm2", "norm__placeholder"),
    ("norm3", "norm2"),
    ("norm__placeholder", "norm3"),
    *((f"self_attn.{old}", f"attn1.{new}") for old, new in _ATTENTION.items()),
    *((f"cross_attn.{old}", f"attn2.{new}") for old, new in _ATTENTION.items()),
    ("attn2.to_k_img", "attn2.add_k_proj"),
    ("attn2.to_v_img", "attn2.add_v_proj"),
    ("attn2.norm_k_img", "attn2.norm_added_k"),
    ("img_emb.proj.0", f"{_IMAGE}.norm1"),
    ("img_emb.proj.1", f"{_IMAGE}.ff.net.0.proj"),
    ("img_emb.proj.3", f"{_IMAGE}.ff.net.2"),
    ("img_emb.proj.4", f"{_IMAGE}.norm2"),
    ("img_emb.emb_pos", f"{_IMAGE}.pos_embed"),
)
# The tensors that sizes are read from, and their axes.
_PATCH, _TEXT, _TIME, _FFN, _OUT = _SIZED = {
    "patch_embedding.weight": 5,
    f"{_EMBEDDER}.text_embedder.linear_1.weight": 2,
    f"{_EMBEDDER}.time_embedder.linear_1.weight": 2,
    "blocks.0.ffn.net.0.proj.weight": 2,
    "proj_out.weight": 2,
}
_HEAD_WIDTH, _SMALLEST_RELEASED = 128, 1024  # in every released Wan
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_ORIGINAL_SIZES = {
    "num_heads": "num_attention_heads",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
}
_UNTOLD = {  # what no tensor tells
    "num_attention_heads": int,
    "attention_head_dim": int,
    "rope_max_seq_len": int,
    "eps": float,
}
# How the original is run, not what it is: a rollout's settings say that here.
_RUNNING = {"model_type", "text_len", "window_size", "local_attn_size", "sink_size"}


@dataclass(frozen=True)
class Converted:
    """A folder that was written: parameters, the dtypes they are stored in, diffusers' config."""

    path: Path
    parameters: int
    dtype: str
    config: dict[str, Any]


def convert(
    source: Path,
    out: Path,
    *,
    config: Path | None = None,
    base: Path | None = None,
    overwrite: bool = False,
) -> Converted:
    """Write the checkpoint `source` as `out`/transformer in diffusers' names, values untouched.

    `config` tells what no tensor does, such as the number of heads. The other parts of the model
    folder `base` are put beside, as hard links where the disk has them.

    Raises UsageError where `out` may not be written over, InputError for files that are not what
    they should be, ModelError for keys or sizes that do not fit, OutputError where writing fails.
    """
    check_target(out, overwrite=overwrite, sources=[p for p in (source, config, base) if p])
    stated = _read_stated(config) if config else {}
    tensors = rename(read_checkpoint(source), source)
    model = _model(tensors, stated, source)
    _check_keys(tensors, model, source)
    sizes = {key: value for key, value in model.config.items() if not key.startswith("_")}
    if base:
        check_base(base, sizes)
    with whole_folder(out, overwrite=overwrite) as part:
        model.save_config(part / "transformer")
        weights = part / "transformer" / "diffusion_pytorch_model.safetensors"
        packed = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(packed, weights, metadata={"format": "pt"})
        shutil.copymode(weights.with_name("config.json"), weights)  # it comes private
        if base:
            copy_parts(base, part)
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return Converted(out, parameters, ", ".join(sorted(dtypes)), sizes)


def read_checkpoint(source: Path) -> Tensors:
    """The tensors of a `.safetensors` file, a folder of them, or a pickle; from disk when used.

    A pickle is read without running anything in it. Raises InputError.
    """
    paths = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    if not paths:
        raise InputError(
            f"{source} has no *.safetensors in it.",
            hint="give the checkpoint's file, or the folder that its shards are in",
        )
    if paths[0].suffix != ".safetensors":
        return _read_pickle(source)
    tensors: Tensors = {}
    for path in paths:
        try:
            shard = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot read {path}: {error}.", hint="copy that file again") from None
        if twice := sorted(shard.keys() & tensors.keys()):
            raise InputError(
                f"{source} has keys in two files: {_some(twice)}.",
                hint="give a folder with the shards of one checkpoint",
            )
        tensors |= shard
    return tensors


def _read_pickle(source: Path) -> Tensors:
    try:
        state = torch.load(
            source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source)
        )
    except Exception as error:  # noqa: BLE001 - what a broken pickle raises, nobody has listed
        if needed := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise InputError(
                f"{source} is more than tensors: loading it would run {needed[1]}.",
                hint="if you trust it, load it in Python and torch.save its state dict alone",
            ) from None
        raise InputError(
            f"{source} is cut short, or is no checkpoint.", hint="copy that file again"
        ) from None
    if isinstance(state, dict):
        tops = (state.get(name) for name in _GENERATORS)
        state = next((top for top in tops if isinstance(top, dict) and top), state)
    if not isinstance(state, dict) or not state:
        raise InputError(f"{source} holds no state dict.", hint="give a Wan checkpoint")
    if odd := [str(k) for k, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise InputError(
            f"{source} has what is no tensor: {_some(odd)}.",
            hint=f"give a state dict, or one under {' or '.join(map(repr, _GENERATORS))}",
        )
    return {str(key): value for key, value in state.items()}


def rename(tensors: Tensors, source: Path) -> Tensors:
    """The same tensors under diffusers' names, which stay as they are. Raises ModelError."""
    bare = {key: _unwrapped(key) for key in tensors}
    if not any(".attn1." in name for name in bare.values()):
        bare = {key: _renamed(name) for key, name in bare.items()}
    renamed = {bare[key]: tensor for key, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        names = list(bare.values())
        raise ModelError(
            f"{source} has keys twice: {_some(sorted({n for n in names if names.count(n) > 1}))}.",
            hint="save the state dict of one model alone",
        )
    return renamed


def _unwrapped(key: str) -> str:
    for wrapper in _WRAPPERS:
        key = key.replace(wrapper, "")
    return key.removeprefix("model.")


def _renamed(name: str) -> str:
    for old, new in _RENAMES:
        name = name.replace(old, new)
    return name


def _model(
    tensors: Tensors, stated: Mapping[str, Any], source: Path
) -> WanTransformer3DModel:
    """The model, without weights, that the tensors' shapes are of. Raises ModelError."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    lost = [n for n, axes in _SIZED.items() if len(shapes.get(n, ())) != axes or 0 in shapes[n]]
    if lost:
        raise ModelError(
            f"{source} is no Wan transformer: missing or of another form: {_some(lost)}.",
            hint="give a Wan checkpoint",
        )
    sizes = _sizes(shapes)
    dim = shapes[_PATCH][0]
    heads = _heads(dim, stated, source)
    told = sizes | {"dim": dim, "num_attention_heads": heads, "attention_head_dim": dim // heads}
    for name, value in stated.items():
        if value != told.get(name, value):
            raise ModelError(
                f"--config says {name} {value}; the weights of {source} say {told[name]}.",
                hint="leave out of --config what the weights say",
            )
    del told["dim"]
    free = {name: stated[name] for name in _UNTOLD if name in stated}
    with torch.device("meta"):
        return WanTransformer3DModel(**(told | free))


def _sizes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The part of diffusers' config that shapes tell."""
    patch = list(shapes[_PATCH][2:])
    layers = (int(found[1]) for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name)))
    image = shapes.get(f"{_IMAGE}.norm1.weight")
    position = shapes.get(f"{_IMAGE}.pos_embed", ())
    added = shapes.get("blocks.0.attn2.add_k_proj.weight")
    return {
        "patch_size": patch,
        "in_channels": shapes[_PATCH][1],
        "out_channels": shapes[_OUT][0] // math.prod(patch),
        "text_dim": shapes[_TEXT][1],
        "freq_dim": shapes[_TIME][1],
        "ffn_dim": shapes[_FFN][0],
        "num_layers": min(1 + max(layers), len(shapes)),  # a layer has a key, or more
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "qk_norm": "rms_norm_across_heads",
        "image_dim": image[-1] if image else None,
        "added_kv_proj_dim": added[-1] if added else None,
        "pos_embed_seq_len": position[1] if len(position) == 3 else None,
    }


def _heads(dim: int, stated: Mapping[str, Any], source: Path) -> int:
    """How many heads share `dim`. Raises ModelError."""
    width = stated.get("attention_head_dim", _HEAD_WIDTH)
    known = "attention_head_dim" in stated or dim >= _SMALLEST_RELEASED
    heads: int | None = stated.get("num_attention_heads", dim // width if known else None)
    if heads is None:
        raise ModelError(
            f"{source} does not tell how many heads share its dim of {dim}.",
            hint='--config FILE.json with {"num_heads": 4}',
        )
    if heads == 0 or dim % (2 * heads):  # rotary embeddings turn pairs
        raise ModelError(
            f"{source} has dim {dim}, which {heads} heads do not share evenly.",
            hint='--config FILE.json with {"num_heads": 4}',
        )
    return heads
