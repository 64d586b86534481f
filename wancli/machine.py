"""Rules about what a video is computed on, and in which numbers."""

from wancli.errors import PlanError
from wancli.settings import Machine


def is_wide(machine: Machine, kind: str) -> bool:
    """Whether weights and activations are float32 on a device of that kind."""
    return machine.dtype == "float32" or (machine.dtype == "auto" and kind == "cpu")


def vae_dtype(machine: Machine) -> str:
    """The VAE's numbers, by torch's name."""
    return "float32" if machine.vae_dtype == "auto" else machine.vae_dtype


def check_machine(machine: Machine) -> None:
    """Raise PlanError for what does not go together on any machine."""
    if machine.dtype == "float16" and machine.device == "cpu":
        raise PlanError(
            "--dtype float16 does not work with --device cpu.", hint="--dtype bfloat16 or float32"
        )
    if machine.vae_dtype == "float16" and machine.device == "cpu":
        raise PlanError(
            "--vae-dtype float16 does not work with --device cpu.",
            hint="--vae-dtype bfloat16, or drop it",
        )
    if machine.device != "auto":
        check_offload_to(machine, machine.device.partition(":")[0])


def check_offload_to(machine: Machine, kind: str) -> None:
    """Raise PlanError where a device of that kind has no memory of its own to be spared."""
    if kind != "cuda" and machine.offload not in ("auto", "none"):
        here = "" if machine.device == kind else f" ({kind} here)"
        raise PlanError(
            f"--offload {machine.offload} spares the memory of a CUDA GPU; that of --device "
            f"{machine.device}{here} is the RAM itself.",
            hint="--offload none",
        )
