"""What glibc's allocator keeps of freed memory. Other allocators are left alone."""

import ctypes
import platform

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
