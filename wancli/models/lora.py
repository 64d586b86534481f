"""Merge LoRAs (arXiv:2106.09685) into a transformer, so that steps cost no more than before."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from wancli.catalog.tasks import EXPERTS
from wancli.models.checkpoint import read_pickle
from wancli.planning.lora import Lora
from wancli.planning.lora_keys import (
    LoraFile,
    LoraFit,
    changed_shapes,
    check_fit,
    fit_lora,
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
            merge_weights(dict(transformer.named_parameters()), own, type(transformer).__name__)


def merge_weights(weights: Mapping[str, Tensor], loras: Sequence[Lora], model: str) -> None:
    """`merge_loras` into the weights of one transformer, by diffusers' names, in place.

    Errors name the `model`.
    """
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    opened = []
    for lora in sorted(loras, key=lambda each: (each.path, each.scale)):
        file, read = _open(lora.path)  # all of them, before any weight changes
        fit = fit_lora(file, shapes)
        check_fit(file, fit, model)
        opened.append(_OpenLora(file, fit, lora.scale, read))
    for layer in dict.fromkeys(layer for lora in opened for layer in lora.fit.layers):
        _merge_layer(layer, weights, [lora for lora in opened if layer in lora.fit.layers])


def _open(path: Path) -> tuple[LoraFile, Callable[[str], Tensor]]:
    if path.suffix == ".safetensors":
        file = read_lora_file(path)  # its header, which is checked
        return file, safe_open(path, "pt").get_tensor
    tensors: Mapping[str, Tensor] = read_pickle(path)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return parse_lora(path, shapes, {}), tensors.__getitem__


@torch.no_grad()
def _merge_layer(layer: str, weights: Mapping[str, Tensor], loras: Collection[_OpenLora]) -> None:
    changed = dict.fromkeys(name for lora in loras for name, _ in changed_shapes(lora.file, layer))
    sums = {name: _wide(weights[name]) for name in changed}
    for lora in loras:
        _add(lora, layer, sums)
    for name, total in sums.items():
        weights[name].copy_(total)


def _add(lora: _OpenLora, layer: str, sums: Mapping[str, Tensor]) -> None:
    """Add what a LoRA changes in a layer to its weight and bias, in place."""
    weight, bias = weight_name(layer), f"{layer}.bias"
    at = next(iter(sums.values())).device
    read = {kind: lora.read(key).to(at).double() for kind, key in lora.fit.layers[layer].items()}
    if "up" in read:
        alpha = float(read["alpha"]) if "alpha" in read else None
        scale = lora.scale * lora.file.scaling(layer, alpha)
        up, down = (read[factor].flatten(1) for factor in ("up", "down"))
        sums[weight].view(len(up), -1).addmm_(up, down, alpha=scale)
        if "up_bias" in read:
            sums[bias].add_(read["up_bias"], alpha=scale)
    for kind, name in (("diff", weight), ("diff_b", bias)):
        if kind in read:
            sums[name].add_(read[kind], alpha=lora.scale)


def _wide(weight: Tensor) -> Tensor:
    """The weight in float64; on the CPU if its device has none."""
    return (weight.cpu() if weight.device.type == "mps" else weight).double().contiguous()
