"""Quantize, fuse and compile a transformer's blocks."""

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from torch import nn

from wancli.config.settings import Machine
from wancli.errors import SetupError, first_line
from wancli.planning.rules_machine import check_device_kind


def quantize(transformer: Any, kind: str) -> None:
    """Quantize the linear layers of the blocks to `int8` or `fp8` (e4m3), one scale per row.

    Weight-only and lossy: they are dequantized to the activations' dtype when used, which every
    device can do. Layers are replaced one by one where they are: on the CPU, so that a GPU never
    holds the original model. Everything outside the blocks, biases and norms are unchanged.
    """
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    # By default torchao sets options of torch.compile for the whole process.
    options = {"set_inductor_config": False}
    config_class = Int8WeightOnlyConfig if kind == "int8" else Float8WeightOnlyConfig
    config = config_class(**options)
    for name, blocks in transformer.named_children():
        if name in ("blocks", "vace_blocks"):
            quantize_(blocks, config, filter_fn=lambda module, _: isinstance(module, nn.Linear))


# torch's max-autotune includes CUDA graphs, which overwrite tensors that caches keep.
MODES = {"max-autotune": "max-autotune-no-cudagraphs"}


def check_speed(machine: Machine, device: torch.device) -> None:
    """Check before loading what only the device can tell. Raises PlanError, SetupError."""
    check_device_kind(machine, device.type)
    if machine.compile:
        check_compiler(device)


def speed_up(transformers: Iterable[Any], machine: Machine) -> None:
    """Fuse, quantize and compile as set; LoRAs must be merged already.

    torch compiles a class of block at most 8 times in a process, over all models: the graphs of
    models loaded before are dropped, and recompiled if those are used again.
    """
    if machine.compile:
        torch._dynamo.reset()
    for transformer in transformers:
        if machine.fuse_qkv:
            fuse_qkv(transformer)
        if machine.quantize != "none":
            quantize(transformer, machine.quantize)
        if machine.compile:
            compile_blocks(transformer, machine.compile_mode)


def fuse_qkv(transformer: Any) -> None:
    """Fuse the projections of each attention into one matrix per input.

    diffusers keeps the separate layers; they are deleted, so that memory stays the same.
    """
    for attn in transformer.modules():
        if not isinstance(attn, AttentionModuleMixin):
            continue
        attn.fuse_projections()
        for name in ("to_k", "to_v") if attn.is_cross_attention else ("to_q", "to_k", "to_v"):
            delattr(attn, name)
        if getattr(attn, "added_kv_proj_dim", None) is not None:
            attn.add_k_proj = attn.add_v_proj = nn.Identity()  # processors test for None


def compile_blocks(transformer: Any, mode: str) -> None:
    """Compile each class of block once, at its first forward."""
    transformer.compile_repeated_blocks(fullgraph=True, mode=MODES.get(mode, mode))
    if mode == "reduce-overhead":  # blocks of one forward read each other's output
        transformer.register_forward_pre_hook(_new_graphs)


def check_compiler(device: torch.device) -> None:
    """Compile a tiny function. Raises SetupError without a working compiler."""
    try:
        torch.compile(torch.sin, fullgraph=True)(torch.zeros(2, device=device))
    except (RuntimeError, ImportError, OSError) as error:
        needs = "C++ compiler (g++ or clang++)" if device.type == "cpu" else "Triton"
        raise SetupError(
            f"`compile` needs a working {needs}: {first_line(error)}",
            hint="`no_compile`",
        ) from error


def _new_graphs(*_: Any) -> None:
    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
