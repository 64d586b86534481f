"""Rules about what a video is computed on, in which numbers, and how its model is made faster."""

from collections.abc import Mapping

from wancli.config.settings import Machine, Settings
from wancli.errors import PlanError
from wancli.utils.packages import check_package

TORCHAO = (0, 18)  # the first whose Int8WeightOnlyConfig has one scale for each row


def check_machine(machine: Machine) -> None:
    """Raise PlanError for what does not go together on any machine."""
    if machine.device != "auto":
        check_kind(machine, machine.device.partition(":")[0])
    if machine.quantize != "none":
        check_package("torchao", TORCHAO, asked="--quantize")
    if machine.compile:
        _check_compile(machine)


def check_kind(machine: Machine, kind: str) -> None:
    """Raise PlanError for what a device of that kind cannot do, or has no memory of its own for."""
    here = machine.device if machine.device == kind else f"{machine.device} ({kind} here)"
    if kind == "cpu" and "float16" in (machine.dtype, machine.vae_dtype):
        name = "--dtype" if machine.dtype == "float16" else "--vae-dtype"
        raise PlanError(
            f"{name} float16 does not work with --device {here}.", hint=f"{name} bfloat16"
        )
    if kind != "cuda" and machine.offload not in ("auto", "none"):
        raise PlanError(
            f"--offload {machine.offload} spares the memory of a CUDA GPU; that of --device "
            f"{here} is the RAM itself.",
            hint="--offload none",
        )
    if machine.quantize == "fp8" and kind == "mps":
        raise PlanError("--quantize fp8 does not work on mps.", hint="--quantize int8")
    if machine.compile and machine.compile_mode == "reduce-overhead" and kind != "cuda":
        raise PlanError(
            f"--compile-mode reduce-overhead is CUDA graphs, and there are none on {kind}.",
            hint="--compile-mode default",
        )


def check_generation(settings: Settings, transformer: str) -> None:
    """Raise PlanError where a faster model of that class does not go with a cache of generate."""
    machine, method = settings.machine, settings.step_cache.step_cache
    if machine.quantize != "none" and settings.prompt_kv.free_kv_weights:
        raise PlanError(
            "--free-kv-weights does not go with --quantize: torchao's weights cannot be emptied.",
            hint="drop --free-kv-weights",
        )
    if not machine.compile:
        return
    if method in ("first-block", "magcache", "seacache"):
        raise PlanError(
            f"--step-cache {method} hooks into blocks, which --compile makes one graph each.",
            hint="--use-cachedit, or --no-compile",
        )
    if method == "cachedit" and transformer == "WanVACETransformer3DModel":
        raise PlanError(
            "--use-cachedit numbers the blocks of VACE: --compile would make a graph for each.",
            hint="--no-compile, or --no-use-cachedit",
        )
    if machine.compile_mode == "reduce-overhead":
        _check_graphs(settings)


def check_rollout(machine: Machine) -> None:
    """Raise PlanError for what rollouts have no place for."""
    if machine.compile:
        raise PlanError(
            "--compile does not go with rollouts: every block would be a graph of its own, and "
            "again for every length of the window.",
            hint="--no-compile",
        )


def check_mode(machine: Machine, sources: Mapping[str, str]) -> None:
    """Raise PlanError for a flag --compile-mode that nothing would read."""
    if sources.get("machine.compile_mode") == "flag" and not machine.compile:
        raise PlanError("--compile-mode does nothing without --compile.", hint="--compile")


def _check_compile(machine: Machine) -> None:
    backend = machine.attention_backend
    if backend != "auto" and "native" not in backend:
        raise PlanError(
            f"--attention-backend {backend} may break the graph of a block that --compile makes.",
            hint="--attention-backend native, or --no-compile",
        )


def _check_graphs(settings: Settings) -> None:
    """CUDA graphs write where they wrote before: what is kept of a step would change with the next.

    Prompt K/V and step caches keep what blocks gave.
    """
    if settings.prompt_kv.prompt_kv:
        raise PlanError(
            "--compile-mode reduce-overhead overwrites what a block gave, and prompt K/V keep it.",
            hint="--no-prompt-kv, or --compile-mode default",
        )
    if settings.step_cache.step_cache != "none":
        raise PlanError(
            "--compile-mode reduce-overhead overwrites what a block gave, and a step cache keeps "
            "it.",
            hint="--step-cache none, or --compile-mode default",
        )
