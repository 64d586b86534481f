"""Rules about devices, dtypes, quantization and compilation."""

from typing import Any

from wancli.catalog.gpus import FP8_CAPABILITY
from wancli.catalog.specs import ModelSpec
from wancli.catalog.tasks import EXPERTS, setting_of
from wancli.config.resolve import Resolved
from wancli.config.settings import Machine, Output, Settings
from wancli.errors import PlanError
from wancli.planning.step_caches import WITH_THRESHOLD
from wancli.utils.packages import check_package

GGUF = (0, 18)
TORCHAO = (0, 18)  # first version whose Int8WeightOnlyConfig has one scale per row


def check_machine(machine: Machine) -> None:
    """Raise PlanError for settings that are incompatible on any machine."""
    if machine.device != "auto":
        check_device_kind(machine, machine.device.partition(":")[0])
    if machine.quantize == "fp8-dynamic":
        _check_fp8_products(machine)


def check_quantizer(machine: Machine) -> None:
    """Raise SetupError if quantization needs a package that is missing; a plan needs none."""
    if machine.quantize != "none":
        check_package("torchao", TORCHAO, needed_by="`quantize`")


def check_gguf_package(spec: ModelSpec) -> None:
    """Raise SetupError if a model's files need a package that is missing; a plan needs none."""
    if file := next((file for file in spec.files if file.quantized), None):
        needed_by = f"`{setting_of(file.part)} {file.path}`, of quantized weights,"
        check_package("gguf", GGUF, needed_by=needed_by)


def check_packed(machine: Machine, spec: ModelSpec) -> None:
    """Raise PlanError for what works only with weights that are not quantized in their file."""
    packed = (spec.file_of(part) for part in EXPERTS.values() if spec.packed_in(part))
    if (file := next(packed, None)) is None:
        return
    refused = {
        f"`quantize {machine.quantize}`": machine.quantize != "none",
        "`fuse_qkv`": machine.fuse_qkv,
    }
    if setting := next((setting for setting, is_set in refused.items() if is_set), ""):
        raise PlanError(
            f"{setting} changes weights, and those of {file.path.name} stay quantized.",
            hint=f"drop {setting}, or give a `transformer` that is not quantized",
        )


def check_output(output: Output) -> None:
    """Raise PlanError for settings of the encoder that do nothing together."""
    if output.encoder != "nvenc":
        return
    if output.lossless:
        raise PlanError("`encoder` nvenc does not encode RGB.", hint="`encoder` x264")
    if output.encoder_preset != "auto":
        raise PlanError(
            f"`encoder_preset {output.encoder_preset}` is one of x264, not of `encoder` nvenc.",
            hint="drop `encoder_preset`, or `encoder` x264",
        )


def check_device_kind(machine: Machine, kind: str) -> None:
    """Raise PlanError for settings that a device of that kind (cuda, mps, cpu) cannot run."""
    device = machine.device if machine.device == kind else f"{machine.device} ({kind} here)"
    if kind == "cpu" and "float16" in (machine.dtype, machine.vae_dtype):
        name = "`dtype`" if machine.dtype == "float16" else "`vae_dtype`"
        raise PlanError(
            f"{name} float16 does not work with `device {device}`.", hint=f"{name} bfloat16"
        )
    if kind != "cuda" and machine.offload not in ("auto", "none"):
        raise PlanError(
            f"`offload {machine.offload}` moves weights from a CUDA GPU to RAM; `device` "
            f"{device} has them in RAM already.",
            hint="`offload none`",
        )
    if machine.quantize == "fp8" and kind == "mps":
        raise PlanError("`quantize fp8` does not work on mps.", hint="`quantize int8`")
    if machine.quantize == "fp8-dynamic" and kind != "cuda":
        raise PlanError(
            f"`quantize fp8-dynamic` multiplies in fp8, which `device {device}` does not.",
            hint="`quantize int8`, which only makes the weights smaller",
        )
    if machine.compile and machine.compile_mode == "reduce-overhead" and kind != "cuda":
        raise PlanError(
            f"`compile_mode` reduce-overhead uses CUDA graphs, and there are none on {kind}.",
            hint="`compile_mode default`",
        )


def check_capability(machine: Machine, gpu: str, capability: tuple[int, int] | None) -> None:
    """Raise PlanError for settings that a GPU of that compute capability, if known, cannot run."""
    if machine.quantize == "fp8-dynamic" and capability and capability < FP8_CAPABILITY:
        major, minor = capability
        raise PlanError(
            f"`quantize fp8-dynamic` needs a GPU of compute capability 8.9 or newer (Ada, Hopper, "
            f"Blackwell); {gpu} has {major}.{minor}.",
            hint="`quantize fp8`, which only makes the weights smaller",
        )


def check_generation(settings: Settings, transformer: str) -> None:
    """Raise PlanError for quantization or compilation that a cache of `generate` rules out."""
    machine, method = settings.machine, settings.step_cache.step_cache
    if machine.quantize != "none" and settings.prompt_kv.free_kv_weights:
        raise PlanError(
            "`free_kv_weights` does not work with `quantize`: torchao's weights cannot be emptied.",
            hint="drop `free_kv_weights`",
        )
    if not machine.compile:
        return
    if not settings.prompt_kv.prompt_kv and machine.attention_backend not in ("auto", "native"):
        raise PlanError(
            f"`compile` with `attention_backend {machine.attention_backend}` needs the prompt K/V "
            "cache: diffusers' own attention to the prompt breaks its graphs.",
            hint="drop `no_prompt_kv`, or `attention_backend native`",
        )
    if method in WITH_THRESHOLD:
        raise PlanError(
            f"`step_cache {method}` hooks into blocks, which `compile` makes one graph each.",
            hint="`use_cachedit`, or `no_compile`",
        )
    if method == "cachedit" and transformer == "WanVACETransformer3DModel":
        raise PlanError(
            "`use_cachedit` numbers the blocks of VACE: `compile` would compile a graph for each.",
            hint="`no_compile`, or `no_use_cachedit`",
        )
    if machine.compile_mode == "reduce-overhead":
        _check_graphs(settings)


def check_rollout(machine: Machine) -> None:
    """Raise PlanError for CUDA graphs, which rollouts do not support."""
    if machine.compile and machine.compile_mode == "reduce-overhead":
        raise PlanError(
            "`compile_mode` reduce-overhead does not work with rollouts: every chunk writes to "
            "another place in the K/V cache, and a CUDA graph to one.",
            hint="`compile_mode default`",
        )


def check_compile_mode(resolved: Resolved[Any]) -> None:
    """Raise PlanError for an explicit compile mode without compilation."""
    if resolved.is_explicit("machine.compile_mode") and not resolved.settings.machine.compile:
        raise PlanError("`compile_mode` does nothing without `compile`.", hint="`compile`")


def _check_fp8_products(machine: Machine) -> None:
    """Raise PlanError for settings under which fp8 products are slower, or impossible.

    Uncompiled, each product first quantizes its input in eight kernels, which takes longer than the
    product in bfloat16.
    """
    if machine.dtype not in ("auto", "bfloat16"):
        raise PlanError(
            f"`quantize fp8-dynamic` works with bfloat16, not with `dtype {machine.dtype}`.",
            hint="`dtype bfloat16`, or `quantize fp8`",
        )
    if not machine.compile:
        raise PlanError(
            "`quantize fp8-dynamic` is slower than bfloat16 without `compile`.",
            hint="`compile`, or `quantize fp8`, which only makes the weights smaller",
        )


def _check_graphs(settings: Settings) -> None:
    """Raise PlanError for CUDA graphs with a cache that keeps outputs of blocks.

    A graph overwrites its outputs on the next replay.
    """
    if settings.prompt_kv.prompt_kv:
        raise PlanError(
            "`compile_mode` reduce-overhead overwrites blocks' output, which prompt K/V keep.",
            hint="`no_prompt_kv`, or `compile_mode default`",
        )
    if settings.step_cache.step_cache != "none":
        raise PlanError(
            "`compile_mode` reduce-overhead overwrites the output of blocks, which a step cache "
            "keeps.",
            hint="`step_cache none`, or `compile_mode default`",
        )
