"""Peak memory of this process, and errors where it runs out."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from wancli.errors import CapacityError
from wancli.utils.heap import glibc, peak_ram


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peaks of RAM and GPU memory so far, in GiB."""
    peaks = {"ram_peak_gib": peak_ram() / 2**30}
    if device.type == "cuda":
        peaks["vram_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return {name: round(value, 3) for name, value in peaks.items()}


def reset_gpu_peak(device: torch.device) -> None:
    """Reset the peak of GPU memory, if the device is one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peaks; that of RAM on Linux only."""
    reset_gpu_peak(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "ascii")


def trim_heap() -> None:
    """Return freed heap to the system, so that resident memory is memory in use.

    glibc keeps freed blocks, and fragmentation made a rollout 100 to 350 MiB larger at random.
    Does nothing with other allocators.
    """
    if libc := glibc():
        libc.malloc_trim(0)


# In errors of no type of their own: of torch on the CPU, of CUDA, cuBLAS and cuDNN, of Metal.
_RAN_OUT = ("allocate memory", "out of memory", "_STATUS_ALLOC_FAILED")


def ran_out(error: BaseException) -> bool:
    """Whether an error of torch or Python says that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _RAN_OUT)


SMALLER = "a smaller `size`, or fewer `num_frames`"
DECODING = "`vae_tiling`, or `vae_decoder tiny`"  # settings that the same latents are decoded with


@contextmanager
def fits_in_memory(model: str, hint: str = SMALLER) -> Iterator[None]:
    """Turn out-of-memory errors into CapacityError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise CapacityError(
            f"{model} does not fit in the memory of this machine.", hint=hint
        ) from None
