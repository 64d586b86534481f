"""Load one component from a file of its own; nothing is copied.

Quantized weights of a GGUF's linear layers stay as they are stored. diffusers' GGUFLinear
dequantizes them whenever they are used, in half precision, as ComfyUI-GGUF does.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from safetensors import safe_open
from torch import Tensor, nn

from wancli.catalog.hf_configs import part_config
from wancli.catalog.local import read_config
from wancli.catalog.specs import ModelSpec, WeightFile
from wancli.catalog.weight_files import WeightKeys, check_keys, read_weight_keys
from wancli.models.random_weights import default_dtype, float32_modules
from wancli.utils.gguf import LAYOUTS, QUANTIZED, is_gguf
from wancli.utils.reading import DTYPE_NAMES, Stored, open_file


def read_part(kind: Any, spec: ModelSpec, file: WeightFile, *, dtype: torch.dtype) -> Any:
    """A component on the CPU in `dtype`, as from a folder: some modules are in float32.

    Weights in fp8 are multiplied by their scales in float32. Raises InputError or ModelError.
    """
    if spec.folder:
        config = read_config(spec.folder, f"{file.part}/config.json")
    else:
        config = part_config(spec.wan, file.part)
    with default_dtype(dtype), init_empty_weights():
        if file.part == "text_encoder":
            model = kind(transformers.UMT5Config(**config))
        else:
            model = kind.from_config(config)
    keys, wide = read_weight_keys(file.path, spec, file.part), float32_modules(model, dtype)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    expected = {n: tuple(t.shape) for n, t in model.state_dict().items() if n not in tied}
    check_keys(file.path, keys, spec, file.part, expected)
    tensors: dict[str, Tensor] = {}
    packed = {name for name in keys.packed() if wide.isdisjoint(name.split("."))}
    with _open_tensors(file, keys) as read:
        for name in keys.stored:
            tensor = read(name)
            if name in packed:
                # Before weights of int8, transformers leaves the activations' dtype alone.
                weight = tensor.view(torch.int8) if file.part == "text_encoder" else tensor
                _use_gguf_linear(model, name.removesuffix(".weight"), weight, dtype)
                tensors[name] = weight
                continue
            at = dtype if wide.isdisjoint(name.split(".")) else torch.float32
            tensors[name] = _dequantized(tensor).reshape(expected[name]).to(at)
    tensors |= {name: tensors[source] for name, source in tied.items()}
    model.load_state_dict(tensors, assign=True)
    if tied:
        model.tie_weights()
    return model.eval()


@contextmanager
def _open_tensors(file: WeightFile, keys: WeightKeys) -> Iterator[Callable[[str], Tensor]]:
    """A function that reads a parameter by name; fp8 is multiplied by its scale."""
    if is_gguf(file.path):
        with open_file(file.path) as opened:
            header = keys.header
            yield lambda name: _read_gguf(opened, header.start, header.tensors[keys.stored[name]])
        return
    with safe_open(file.path, "pt") as stored:

        def read(name: str) -> Tensor:
            tensor: Tensor = stored.get_tensor(keys.stored[name])
            scale = keys.scales.get(name)
            return _scaled(tensor, stored.get_tensor(scale)) if scale else tensor

        yield read


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """The float32 values of a weight [out, ...] in fp8, for one scale or one for each row."""
    rows = scale.float().reshape(-1, *[1] * (weight.ndim - 1))
    return weight.float() * rows


def _read_gguf(file: io.BufferedReader, start: int, stored: Stored) -> Tensor:
    """A tensor of a GGUF file; a quantized one as diffusers' parameter, [..., bytes of a row]."""
    content = torch.empty(stored.end - stored.begin, dtype=torch.uint8)
    file.seek(start + stored.begin)
    file.readinto(content.numpy())  # type: ignore[arg-type]
    if stored.dtype not in QUANTIZED:
        return content.view(getattr(torch, DTYPE_NAMES[stored.dtype])).reshape(stored.shape)
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFParameter

    layout = LAYOUTS[stored.dtype]
    row = stored.shape[-1] // layout.weights * layout.bytes
    rows = content.reshape(*stored.shape[:-1], row)
    packed: Tensor = GGUFParameter(rows, quant_type=gguf.GGMLQuantizationType[stored.dtype])
    return packed


def _dequantized(tensor: Tensor) -> Tensor:
    """The values of a quantized parameter; any other tensor as it is."""
    if not hasattr(tensor, "quant_type"):
        return tensor
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    values: Tensor = dequantize_gguf_tensor(tensor)
    return values


def _use_gguf_linear(model: nn.Module, name: str, weight: Tensor, dtype: torch.dtype) -> None:
    """Replace a linear layer by diffusers' that dequantizes its weight, to `dtype`, at each use."""
    from diffusers.quantizers.gguf.utils import GGUFLinear

    parent, _, attribute = name.rpartition(".")
    old = model.get_submodule(name)
    with init_empty_weights():
        bias = old.bias is not None
        new = GGUFLinear(old.in_features, old.out_features, bias, compute_dtype=dtype)
    new.weight = weight
    setattr(model.get_submodule(parent), attribute, new.requires_grad_(requires_grad=False))
