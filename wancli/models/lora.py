"""Merge LoRAs (arXiv:2106.09685) into a transformer, so that steps cost no more than before.

Into weights that are quantized in a GGUF file nothing is merged: each would be rounded anew. A
LoRA's product is computed beside them at each step.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from wancli.catalog.tasks import EXPERTS
from wancli.models.checkpoint import read_pickle
from wancli.planning.lora import Lora
from wancli.planning.lora_keys import (
    LoraFile,
    LoraFit,
    changed_shapes,
    check_fit,
    check_packed_layers,
    fit_lora,
    has_header,
    parse_lora,
    read_lora_file,
    weight_name,
)


@dataclass(frozen=True)
class _OpenLora:
    """A LoRA that fits a transformer, and how to read its tensors."""

    file: LoraFile
    fit: LoraFit
    scale: float
    read: Callable[[str], Tensor]  # by key


class Factors(NamedTuple):
    """A LoRA's product in one layer, up @ down, scaled."""

    up: Tensor  # [out, R]
    down: Tensor  # [R, in]


def merge_loras(pipeline: Any, loras: Sequence[Lora]) -> None:
    """Add scale * alpha / rank * B @ A of every LoRA, and its differences, to the weights.

    Sums are taken in float64 and in the order of the files' names, so that the order of `loras`
    does not matter, and rounded once. Raises InputError for a broken file, ModelError for a LoRA of
    another model.
    """
    for expert, part in EXPERTS.items():
        own = [lora for lora in loras if (lora.expert or "high") == expert]
        if own:
            transformer = getattr(pipeline, part)
            weights = dict(transformer.named_parameters())
            beside = merge_weights(weights, own, type(transformer).__name__)
            for layer, factors in beside.items():
                _add_beside(transformer.get_submodule(layer), factors)


def merge_weights(
    weights: Mapping[str, Tensor], loras: Sequence[Lora], model: str
) -> dict[str, list[Factors]]:
    """`merge_loras` into the weights of one transformer, by diffusers' names, in place.

    Returns the factors of layers whose weights are quantized, by layer. Errors name the `model`.
    """
    shapes = {n: tuple(getattr(w, "quant_shape", w.shape)) for n, w in weights.items()}
    packed = {name for name, weight in weights.items() if _is_packed(weight)}
    opened = []
    for lora in sorted(loras, key=lambda each: (each.path, each.scale)):
        file, read = _open(lora.path)  # all of them, before any weight changes
        fit = fit_lora(file, shapes)
        check_fit(file, fit, model)
        check_packed_layers(file, fit, packed)
        opened.append(_OpenLora(file, fit, lora.scale, read))
    beside = {}
    for layer in dict.fromkeys(layer for lora in opened for layer in lora.fit.layers):
        own = [lora for lora in opened if layer in lora.fit.layers]
        if factors := _merge_layer(layer, weights, own):
            beside[layer] = factors
    return beside


def _open(path: Path) -> tuple[LoraFile, Callable[[str], Tensor]]:
    file = read_lora_file(path) if has_header(path) else None
    if path.suffix == ".safetensors" and file:
        return file, safe_open(path, "pt").get_tensor
    tensors: Mapping[str, Tensor] = read_pickle(path)
    if file:
        return file, tensors.__getitem__
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return parse_lora(path, shapes, {}), tensors.__getitem__


@torch.no_grad()
def _merge_layer(
    layer: str, weights: Mapping[str, Tensor], loras: Collection[_OpenLora]
) -> list[Factors]:
    """Merge into a layer's weight and bias; returns the factors for a weight that is quantized."""
    changed = dict.fromkeys(name for lora in loras for name, _ in changed_shapes(lora.file, layer))
    at = _merged_at(next(weights[name].device for name in changed))
    sums = {
        name: weights[name].to(at).double().contiguous()
        for name in changed
        if not _is_packed(weights[name])
    }
    factors = [each for lora in loras for each in _add(lora, layer, sums, at)]
    for name, total in sums.items():
        weights[name].copy_(total)
    return factors


def _add(
    lora: _OpenLora, layer: str, sums: Mapping[str, Tensor], at: torch.device
) -> Iterator[Factors]:
    """Add what a LoRA changes in a layer to its weight and bias, in place.

    Yields the factors if the weight is not among the sums.
    """
    weight, bias = weight_name(layer), f"{layer}.bias"
    read = {kind: lora.read(key).to(at).double() for kind, key in lora.fit.layers[layer].items()}
    if "up" in read:
        alpha = float(read["alpha"]) if "alpha" in read else None
        scale = lora.scale * lora.file.scaling(layer, alpha)
        up, down = (read[factor].flatten(1) for factor in ("up", "down"))
        if weight in sums:
            sums[weight].view(len(up), -1).addmm_(up, down, alpha=scale)
        else:
            yield Factors(scale * up, down)
        if "up_bias" in read:
            sums[bias].add_(read["up_bias"], alpha=scale)
    for kind, name in (("diff", weight), ("diff_b", bias)):
        if kind in read:
            sums[name].add_(read[kind], alpha=lora.scale)


def _merged_at(device: torch.device) -> torch.device:
    """Where weights of a device are summed in float64: on the CPU if it has none."""
    return torch.device("cpu") if device.type == "mps" else device


def _is_packed(weight: Tensor) -> bool:
    """Whether it is one of diffusers' quantized parameters."""
    return hasattr(weight, "quant_type")


def _add_beside(layer: Any, factors: Sequence[Factors]) -> None:
    """Let a linear layer of a quantized weight add a LoRA's product to its output."""
    down = torch.cat([each.down for each in factors])
    up = torch.cat([each.up for each in factors], dim=1)
    for name, factor in (("lora_down", down), ("lora_up", up)):
        narrow = factor.to(layer.weight.device, layer.compute_dtype)
        layer.register_parameter(name, nn.Parameter(narrow, requires_grad=False))
    layer.register_forward_hook(_add_product)


def _add_product(layer: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return output + functional.linear(functional.linear(inputs[0], layer.lora_down), layer.lora_up)
