"""Read original Wan checkpoints under diffusers' key names, which are in `catalog/wan_layers.py`.

Pickles of https://github.com/guandeh17/Self-Forcing (33593df) hold `generator_ema`, `generator`, or
both; their keys carry the prefixes of FSDP and of the trainer.
"""

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from wancli.catalog.wan_layers import parameter_names, strip_wrappers
from wancli.errors import InputError, ModelError, some
from wancli.records.tensor_files import checkpoint_files
from wancli.utils.pickles import ENTRIES
from wancli.utils.reading import unreadable

Tensors = dict[str, torch.Tensor]

_PREFIX = re.compile(r"^(?:model\.|net\.)")


def read_checkpoint(source: Path, entry: str = "") -> Tensors:
    """Read a `.safetensors` file, a folder of them, or a pickle, under diffusers' key names.

    Tensors are memory-mapped, and no code in a pickle is run. `entry` as in `read_pickle`. Raises
    InputError for a file that is broken or of another format, ModelError for duplicate keys.
    """
    paths = checkpoint_files(source)
    if source.is_dir() or source.suffix == ".safetensors":
        if entry:
            raise InputError(
                f"`entry {entry}`: {source} is not a pickle, and has no entries.",
                hint="drop `entry`",
            )
        tensors = _read_shards(source, paths)
    else:
        tensors = read_pickle(source, entry)
    return _rename_keys(tensors, source)


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


def read_pickle(source: Path, entry: str = "") -> Tensors:
    """The tensors of a torch pickle, memory-mapped; no code in it is run. Raises InputError.

    They are in its `entry`, else in the first of `ENTRIES`, else in the pickle itself.
    """
    try:
        mmap = zipfile.is_zipfile(source)  # pickles of the format before zip cannot be mapped
        state = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # noqa: BLE001 - a broken pickle can raise anything
        raise _unreadable(source, error) from None
    if isinstance(state, dict):
        nested = {str(k): inner for k, inner in state.items() if isinstance(inner, dict) and inner}
        if entry and entry not in nested:
            has = f"entries {some(list(nested))}" if nested else "no entries"
            raise InputError(
                f"`entry {entry}`: {source} has {has}.",
                hint=f"`entry {next(iter(nested))}`" if nested else "drop `entry`",
            )
        names = (name for name in (entry, *ENTRIES) if name in nested)
        state = next((nested[name] for name in names), state)
    if not isinstance(state, dict) or not state:
        raise InputError(f"{source} holds no state dict.", hint="give a Wan checkpoint")
    if others := [str(key) for key, value in state.items() if not isinstance(value, torch.Tensor)]:
        raise InputError(
            f"{source} holds entries that are not tensors: {some(others)}.",
            hint=f"give a state dict, bare or under {' or '.join(map(repr, ENTRIES))}",
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
    bare = {key: _PREFIX.sub("", strip_wrappers(key)) for key in tensors}
    names = parameter_names(bare.values(), source)
    return {names[bare[key]]: _as_convolution(names[bare[key]], t) for key, t in tensors.items()}


def _as_convolution(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The weight of the patch embedding [dim, in, 1, 2, 2], of which rCM has [dim, in * 4].

    Its order: rcm/networks/wan2pt1.py#L656 of https://github.com/NVlabs/rcm (5b41aa9).
    """
    flat = name == "patch_embedding.weight" and tensor.ndim == 2 and tensor.shape[1] % 4 == 0
    return tensor.view(len(tensor), -1, 1, 2, 2) if flat else tensor
