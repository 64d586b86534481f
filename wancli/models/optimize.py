"""Quantize, fuse and compile a transformer's blocks."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from torch import nn

from wancli.config.settings import Machine
from wancli.errors import SetupError, first_line
from wancli.models.memory import ran_out
from wancli.planning.rules_machine import check_capability, check_device_kind

# Projections of the prompt in cross-attention: they run once per prompt.
PROMPT_PROJECTIONS = ("to_k", "to_v", "to_kv", "add_k_proj", "add_v_proj", "to_added_kv")
HINT_PROJECTIONS = ("proj_in", "proj_out")  # of a VACE block, added to what all blocks read


def quantize(transformer: Any, kind: str) -> None:
    """Quantize the linear layers of the blocks, one scale per row. Lossy.

    `int8` and `fp8` (e4m3) are weight-only: the weights are dequantized to the activations' dtype
    when used, which every device can do. `fp8-dynamic` also quantizes the activations, one scale
    per token, and multiplies in fp8. Layers are replaced one by one where they are: on the CPU, so
    that a GPU never holds the original model. Everything outside the blocks, biases and norms are
    unchanged.
    """
    from torchao.quantization import quantize_

    config = _torchao_config(kind)
    chosen = _multiplies_in_fp8 if kind == "fp8-dynamic" else _is_linear
    for name, blocks in transformer.named_children():
        if name in ("blocks", "vace_blocks"):
            quantize_(blocks, config, filter_fn=chosen)


def _torchao_config(kind: str) -> Any:
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        PerRow,
    )
    from torchao.quantization.quantize_.common import KernelPreference

    # By default torchao sets options of torch.compile for the whole process.
    options = {"set_inductor_config": False}
    if kind == "fp8-dynamic":
        # torch's own kernel: others quantize weights on a GPU only, and are graph breaks.
        return Float8DynamicActivationFloat8WeightConfig(
            granularity=PerRow(), kernel_preference=KernelPreference.TORCH, **options
        )
    return {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[kind](**options)


def _is_linear(module: nn.Module, _: str) -> bool:
    return isinstance(module, nn.Linear)


def _multiplies_in_fp8(module: nn.Module, name: str) -> bool:
    """Whether `fp8-dynamic` quantizes this layer of the blocks: one that runs in every forward.

    Time, text and image embedders, the patch embedding and the output projection stay wide in
    NVIDIA's ModelOpt and in vLLM-Omni, too. So do the prompt's keys and values, which are computed
    once, and VACE's hints. torch._scaled_mm takes sizes that are multiples of 16.
    """
    attention, _, layer = name.rpartition(".")
    if not isinstance(module, nn.Linear) or layer in HINT_PROJECTIONS:
        return False
    if attention.endswith("attn2") and layer in PROMPT_PROJECTIONS:
        return False
    return module.in_features % 16 == 0 and module.out_features % 16 == 0


# torch's max-autotune includes CUDA graphs, which overwrite tensors that caches keep.
MODES = {"max-autotune": "max-autotune-no-cudagraphs"}


def check_speed(machine: Machine, device: torch.device) -> None:
    """Check before loading what only the device can tell. Raises PlanError, SetupError."""
    check_device_kind(machine, device.type)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        check_capability(machine, torch.cuda.get_device_name(device), capability)
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


# Of a class of block in a process: two or three for each kind of clip or rollout, until torch makes
# a size symbolic.
_MAX_GRAPHS = 64


@contextmanager
def enough_graphs(*, compiled: bool) -> Iterator[None]:
    """Let compiled blocks be of many kinds in the block: after 8 graphs torch would raise."""
    if not compiled:  # and torch's compiler is not imported
        yield
        return
    with torch._dynamo.config.patch(recompile_limit=_MAX_GRAPHS):
        yield


def check_compiler(device: torch.device) -> None:
    """Compile a tiny function. Raises SetupError without a working compiler."""
    try:
        torch.compile(torch.sin, fullgraph=True)(torch.zeros(2, device=device))
    except (RuntimeError, ImportError, OSError) as error:
        if ran_out(error):
            raise
        needs = "C++ compiler (g++ or clang++)" if device.type == "cpu" else "Triton"
        raise SetupError(
            f"`compile` needs a working {needs}: {first_line(error)}",
            hint="`no_compile`",
        ) from error


def _new_graphs(*_: Any) -> None:
    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
