"""Rules about what a video is computed on, and in which numbers."""

from wancli.errors import PlanError
from wancli.settings import Machine


def is_wide(machine: Machine, kind: str) -> bool:
    """Whether weights and activations are float32 on a device of that kind."""
    return machine.dtype == "float32" or (machine.dtype == "auto" and kind == "cpu")


def check_machine(machine: Machine) -> None:
    """Raise PlanError for what does not go together on any machine."""
    if machine.dtype == "float16" and machine.device == "cpu":
        raise PlanError(
            "--dtype float16 does not work with --device cpu.", hint="--dtype bfloat16 or float32"
        )
