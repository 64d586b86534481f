"""What memory this process holds."""

import ctypes
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from wancli.errors import CapacityError


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peaks so far, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"ram_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    if device.type == "cuda":
        peaks["vram_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return {name: round(value, 3) for name, value in peaks.items()}


def reset_peak_memory(device: torch.device) -> None:
    """Let peaks begin now. Of RAM that is only for Linux to do; elsewhere they stay."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "ascii")


def give_back() -> None:
    """Return what is free to the system; what stays resident is what is in use.

    glibc keeps freed blocks for the next ones, and where those do not fit the holes it takes more:
    100 to 350 MiB of a rollout came and went with chance. Other allocators are left alone.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def fits_in_memory(model: str) -> Iterator[None]:
    """Raise CapacityError where it does not; on the CPU torch says so only in the message."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        kinds = (torch.OutOfMemoryError, MemoryError)
        if not isinstance(error, kinds) and "can't allocate memory" not in str(error):
            raise
        raise CapacityError(
            f"{model} does not fit in the memory of this machine.",
            hint="a smaller --size, or fewer --num-frames (rollout: a smaller --rolling-window)",
        ) from None
