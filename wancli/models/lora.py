"""Merge LoRAs (arXiv:2106.09685) into a transformer, so that steps cost no more than before."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wancli.catalog.tasks import EXPERTS
from wancli.errors import ModelError, first_line
from wancli.models.checkpoint import Tensors, read_checkpoint
from wancli.planning.lora import Lora

ADAPTER = "wancli"
HINT = "give a LoRA of this model, as .safetensors or .pt, in peft's or Wan's naming"
_HEADS = re.compile(r"^(?:base_model\.model\.|diffusion_model\.|model\.|transformer\.)+")
# diffusers fills these with zeros when it loads a text-to-video LoRA into an image-to-video model.
_OF_IMAGES = ("add_k_proj", "add_v_proj")
_IMAGES = (*_OF_IMAGES, "k_img", "v_img")
_MIDDLES = {".lora_down.": ".lora_A.", ".lora_up.": ".lora_B.", ".default.": "."}


def merge_loras(pipeline: Any, loras: Sequence[Lora]) -> None:
    """Add scale * B @ A of every LoRA to the weights of its transformer.

    Raises InputError for a broken file, ModelError for a LoRA of another model.
    """
    for lora in loras:
        part = EXPERTS[lora.expert or "high"]
        _load(pipeline, lora.path, part)
        pipeline.set_adapters([ADAPTER], [lora.scale])
        pipeline.fuse_lora(components=[part], adapter_names=[ADAPTER])
        pipeline.unload_lora_weights()


def read_lora(path: Path) -> Tensors:
    """Read matrices as `LAYER.lora_A.weight` and `LAYER.lora_B.weight`, also LongLive's pickles.

    An alpha is multiplied in, which peft does by its configuration.
    """
    tensors = {_peft_name(name): tensor for name, tensor in read_checkpoint(path).items()}
    for name in [name for name in tensors if name.endswith(".alpha")]:
        alpha, down = float(tensors.pop(name)), f"{name.removesuffix('.alpha')}.lora_A.weight"
        if down in tensors:
            tensors[down] = tensors[down] * (alpha / len(tensors[down]))
    return tensors


def _peft_name(name: str) -> str:
    for old, new in _MIDDLES.items():
        name = name.replace(old, new)
    return _HEADS.sub("", name)


def _load(pipeline: Any, path: Path, part: str) -> None:
    """Load a LoRA as an adapter of a transformer; every pair of matrices must find its layer."""
    tensors = read_lora(path)
    pairs = [name for name in tensors if name.endswith(".lora_A.weight")]
    if not pairs:
        raise ModelError(f"{path} holds no LoRA.", hint=HINT)
    if any("img_attn_qkv" in name for name in pairs):
        raise ModelError(
            f"LoRA {path} is in HunyuanVideo's original naming, with fused layers.",
            hint="give it in diffusers' naming",
        )
    state = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    second = {"load_into_transformer_2": True} if part == EXPERTS["low"] else {}
    try:
        pipeline.load_lora_weights(state, adapter_name=ADAPTER, **second)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"LoRA {path} does not fit: {first_line(error)}", hint=HINT) from None
    matched = sum(
        ADAPTER in getattr(layer, "lora_A", {})
        for name, layer in getattr(pipeline, part).named_modules()
        if not name.endswith(_OF_IMAGES)
        or any(image in pair for image in _IMAGES for pair in pairs)
    )
    if matched != len(pairs):
        raise ModelError(
            f"LoRA {path}: only {matched} of its {len(pairs)} layers exist in this model.",
            hint=HINT,
        )
