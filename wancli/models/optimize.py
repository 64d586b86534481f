"""Weights of a transformer's blocks in 8 bits (lossy): memory, at the price of some error."""

from collections.abc import Iterable
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from torch import nn

from wancli.config.settings import Machine
from wancli.errors import SetupError, first_line
from wancli.planning.rules_machine import check_kind


def quantize(transformer: Any, kind: str) -> None:
    """Keep the linear layers of the blocks as `int8` or `fp8` (e4m3), with a scale for each row.

    They are widened to the dtype of the activations as they are used, which every device can do.
    One layer is exchanged after the other, where it is: on the CPU, so that a GPU need never hold
    the model as it was. What is outside the blocks, biases and norms stay as they are.
    """
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    # Left to itself torchao sets options of torch.compile for the whole process.
    whole = {"set_inductor_config": False}
    config = Int8WeightOnlyConfig(**whole) if kind == "int8" else Float8WeightOnlyConfig(**whole)
    for name, blocks in transformer.named_children():
        if name in ("blocks", "vace_blocks"):
            quantize_(blocks, config, filter_fn=lambda module, _: isinstance(module, nn.Linear))


# torch's own max-autotune has CUDA graphs, too: they overwrite what caches keep.
MODES = {"max-autotune": "max-autotune-no-cudagraphs"}


def check_speed(machine: Machine, device: torch.device) -> None:
    """Try, before anything loads, what only a device can say. Raises PlanError, SetupError."""
    check_kind(machine, device.type)
    if machine.compile:
        check_compiler(device)


def speed_up(transformers: Iterable[Any], machine: Machine) -> None:
    """Fuse, quantize and compile what the settings say, LoRAs being merged.

    torch compiles a kind of block 8 times at most in a process, whatever the model: the graphs of
    models loaded before are forgotten, and made again if those are used again.
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
    """Let every attention project in one product what it projects of one input.

    diffusers keeps the layers that it fused; here they go, so that there is no weight more.
    """
    for attn in transformer.modules():
        if not isinstance(attn, AttentionModuleMixin):
            continue
        attn.fuse_projections()
        for name in ("to_k", "to_v") if attn.is_cross_attention else ("to_q", "to_k", "to_v"):
            delattr(attn, name)
        if getattr(attn, "added_kv_proj_dim", None) is not None:
            attn.add_k_proj = attn.add_v_proj = nn.Identity()  # processors ask if there is one


def compile_blocks(transformer: Any, mode: str) -> None:
    """Compile each kind of block, at its first forward, for all blocks of that kind."""
    transformer.compile_repeated_blocks(fullgraph=True, mode=MODES.get(mode, mode))
    if mode == "reduce-overhead":  # the blocks of one forward read each other's output
        transformer.register_forward_pre_hook(_new_graphs)


def check_compiler(device: torch.device) -> None:
    """Compile something tiny. Raises SetupError where there is no compiler, or a broken one."""
    try:
        torch.compile(torch.sin, fullgraph=True)(torch.zeros(2, device=device))
    except (RuntimeError, ImportError, OSError) as error:
        needs = "a C++ compiler (g++ or clang++)" if device.type == "cpu" else "Triton"
        raise SetupError(
            f"--compile needs {needs} that works, and found none: {first_line(error)}",
            hint="--no-compile",
        ) from error


def _new_graphs(*_: Any) -> None:
    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
