"""Load one component from a file of its own; nothing is copied."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from safetensors import safe_open

from wancli.catalog.hf_configs import part_config
from wancli.catalog.local import read_config
from wancli.catalog.specs import ModelSpec, WeightFile
from wancli.catalog.weight_files import read_weight_keys
from wancli.errors import ModelError, some
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
        model = kind.from_config(config)
    keys, wide = read_weight_keys(file.path), float32_modules(model, dtype)
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(file.path, "pt") as stored:
        for name, key in keys.stored.items():
            tensor = stored.get_tensor(key)
            if name in keys.scales:
                tensor = _dequantized(tensor, stored.get_tensor(keys.scales[name]))
            tensors[name] = tensor.to(dtype if wide.isdisjoint(name.split(".")) else torch.float32)
    _check_tensors(model, tensors, file)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _dequantized(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The float32 values of a weight [out, ...] in fp8, for one scale or one for each row."""
    rows = scale.float().reshape(-1, *[1] * (weight.ndim - 1))
    return weight.float() * rows


def _check_tensors(model: Any, tensors: Mapping[str, torch.Tensor], file: WeightFile) -> None:
    """Raise ModelError for a model whose config.json was not known when its file was checked."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wrong = sorted(
        name
        for name in shapes.keys() | tensors.keys()
        if name not in tensors or tensors[name].shape != shapes.get(name)
    )
    if wrong:
        raise ModelError(
            f"{file.path} does not fit the config.json of {file.part}: {some(wrong)}.",
            hint="give the weights of that model",
        )
