"""Memory of this process: its peak, and what glibc's allocator keeps of what is freed."""

import ctypes
import platform
import resource
import sys
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT = 256 * 2**20


def keep_heap() -> None:
    """Keep up to 256 MiB of freed memory for what comes next: for a process of our own.

    By default the memory of large tensors goes back to the system and is paged in again, operation
    by operation: a fifth of the time of a clip's VAE on a CPU.
    """
    if libc := glibc():
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)


def glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def peak_ram() -> int:
    """The most RAM that this process has had, in bytes.

    Linux counts in `ru_maxrss` the process that started this one, too, however large that was.
    """
    try:
        lines = Path("/proc/self/status").read_text("ascii", "replace").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
