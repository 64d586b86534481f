"""Read original Wan checkpoints under diffusers' key names.

Original keys: wan/modules/model.py of https://github.com/Wan-Video/Wan2.1 (9737cba). Their names in
diffusers: scripts/convert_wan_to_diffusers.py of https://github.com/huggingface/diffusers
(58eb52c). Pickles of https://github.com/guandeh17/Self-Forcing (33593df) hold `generator_ema`,
`generator`, or both; their keys carry the prefixes of FSDP and of the trainer.
"""

import re
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from wancli.errors import InputError, ModelError
from wancli.records.tensor_files import checkpoint_files
from wancli.utils.reading import unreadable

Tensors = dict[str, torch.Tensor]

_GENERATORS = (
    "generator_ema",
    "generator",
    "generator_lora",
)  # the EMA first: it is the one to sample from
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_MAX_LISTED = 8  # names in one error

_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
EMBEDDER = "condition_embedder"
IMAGE = f"{EMBEDDER}.image_embedder"
# Order matters: each pair applies to the result of those before it.
_RENAMES = (
    ("time_embedding.0", f"{EMBEDDER}.time_embedder.linear_1"),
    ("time_embedding.2", f"{EMBEDDER}.time_embedder.linear_2"),
    ("text_embedding.0", f"{EMBEDDER}.text_embedder.linear_1"),
    ("text_embedding.2", f"{EMBEDDER}.text_embedder.linear_2"),
    ("time_projection.1", f"{EMBEDDER}.time_proj"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
    ("modulation", "scale_shift_table"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
    # The original applies its norms in the order 1, 3, 2; diffusers in the order 1, 2, 3.
    ("norm2", "norm__placeholder"),
    ("norm3", "norm2"),
    ("norm__placeholder", "norm3"),
    *((f"self_attn.{old}", f"attn1.{new}") for old, new in _ATTENTION.items()),
    *((f"cross_attn.{old}", f"attn2.{new}") for old, new in _ATTENTION.items()),
    # Image-to-video only.
    ("attn2.to_k_img", "attn2.add_k_proj"),
    ("attn2.to_v_img", "attn2.add_v_proj"),
    ("attn2.norm_k_img", "attn2.norm_added_k"),
    ("img_emb.proj.0", f"{IMAGE}.norm1"),
    ("img_emb.proj.1", f"{IMAGE}.ff.net.0.proj"),
    ("img_emb.proj.3", f"{IMAGE}.ff.net.2"),
    ("img_emb.proj.4", f"{IMAGE}.norm2"),
    ("img_emb.emb_pos", f"{IMAGE}.pos_embed"),
)


def read_checkpoint(source: Path) -> Tensors:
    """Read a `.safetensors` file, a folder of them, or a pickle, under diffusers' key names.

    Tensors are memory-mapped, and no code in a pickle is run. Raises InputError for a file that is
    broken or of another format, ModelError for duplicate keys.
    """
    paths = checkpoint_files(source)
    if source.is_dir() or source.suffix == ".safetensors":
        tensors = _read_shards(source, paths)
    else:
        tensors = _read_pickle(source)
    return _rename_keys(tensors, source)


def some(names: Sequence[str]) -> str:
    """Join the first names of a list, and say how many more there are."""
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def _read_shards(source: Path, paths: Sequence[Path]) -> Tensors:
    tensors: Tensors = {}
    for path in paths:
        try:
            shard = load_file(path)
        except (OSError, SafetensorError) as error:
            raise unreadable(path, error, hint="copy that file again") from None
        if duplicates := sorted(shard.keys() & tensors.keys()):
            raise ModelError(
                f"{source} has keys in two files: {some(duplicates)}.",
                hint="give one file, or a folder with the shards of one checkpoint",
            )
        tensors |= shard
    return tensors


def _read_pickle(source: Path) -> Tensors:
    try:
        mmap = zipfile.is_zipfile(source)  # pickles of the format before zip cannot be mapped
        state = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # noqa: BLE001 - a broken pickle can raise anything
        raise _unreadable(source, error) from None
    if isinstance(state, dict):
        nested = (state.get(name) for name in _GENERATORS)
        state = next((inner for inner in nested if isinstance(inner, dict) and inner), state)
    if not isinstance(state, dict) or not state:
        raise InputError(f"{source} holds no state dict.", hint="give a Wan checkpoint")
    if others := [str(key) for key, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise InputError(
            f"{source} holds entries that are not tensors: {some(others)}.",
            hint=f"give a state dict, bare or under {' or '.join(map(repr, _GENERATORS))}",
        )
    return {str(key): tensor for key, tensor in state.items()}


def _unreadable(source: Path, error: Any) -> InputError:
    if isinstance(error, OSError) and error.filename:
        return InputError(f"cannot read {source}: {error.strerror}.", hint="check that file")
    if needed := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return InputError(
            f"{source} holds more than tensors: loading it would run {needed[1]}.",
            hint="ask its author for .safetensors, or torch.save its state dict alone",
        )
    return InputError(
        f"{source} is truncated, or not a checkpoint that loads without running code.",
        hint="copy that file again, or ask its author for .safetensors",
    )


def _rename_keys(tensors: Tensors, source: Path) -> Tensors:
    names = [_strip_wrappers(key) for key in tensors]
    if not any(".attn1." in name for name in names):  # else they are diffusers' already
        names = [_to_diffusers(name) for name in names]
    if duplicates := sorted(name for name, times in Counter(names).items() if times > 1):
        raise ModelError(
            f"{source} has duplicate keys, under different prefixes: {some(duplicates)}.",
            hint="save the state dict of one model alone",
        )
    return dict(zip(names, tensors.values(), strict=True))


def _strip_wrappers(key: str) -> str:
    for wrapper in _WRAPPERS:
        key = key.replace(wrapper, "")
    return key.removeprefix("model.")


def _to_diffusers(name: str) -> str:
    for old, new in _RENAMES:
        name = name.replace(old, new)
    return name
