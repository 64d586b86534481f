"""Load one component from a file of its own; nothing is copied."""

from typing import Any

import torch
import transformers
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from safetensors import safe_open

from wancli.catalog.hf_configs import part_config
from wancli.catalog.local import read_config
from wancli.catalog.specs import ModelSpec, WeightFile
from wancli.catalog.weight_files import check_keys, read_weight_keys
from wancli.models.random_weights import default_dtype, float32_modules


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
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(file.path, "pt") as stored:
        for name, key in keys.stored.items():
            tensor = stored.get_tensor(key)
            if name in keys.scales:
                tensor = _dequantized(tensor, stored.get_tensor(keys.scales[name]))
            tensors[name] = tensor.to(dtype if wide.isdisjoint(name.split(".")) else torch.float32)
    tensors |= {name: tensors[source] for name, source in tied.items()}
    model.load_state_dict(tensors, assign=True)
    if tied:
        model.tie_weights()
    return model.eval()


def _dequantized(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The float32 values of a weight [out, ...] in fp8, for one scale or one for each row."""
    rows = scale.float().reshape(-1, *[1] * (weight.ndim - 1))
    return weight.float() * rows
