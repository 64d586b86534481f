"""Environment of a process of our own, chosen before torch loads: its threads and its memory.

A library leaves these to the program that imports it: only the command line chooses.

Torch's Linux wheels bundle GNU OpenMP, which MKL and oneDNN use, too. Its threads spin at the end
of every parallel loop, by default for milliseconds: about a scheduler time slice, so beside another
busy process they mostly wait for each other. Tens of microseconds (1000 spins) are as fast on an
idle machine, and yield the core on a busy one (make bench-threads).
"""

import os
import sys

_OPENMP = ("OMP_", "GOMP_", "KMP_", "MKL_")
_WAITING = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}  # either sets how long threads spin
_SPINCOUNT = "1000"

_chosen: dict[str, str] = {}


def choose_threads() -> None:
    """Set OpenMP's environment before it is loaded, unless the user did."""
    if "torch" not in sys.modules and not _WAITING & set(os.environ):
        _chosen["GOMP_SPINCOUNT"] = os.environ["GOMP_SPINCOUNT"] = _SPINCOUNT


def choose_pages() -> None:
    """Use huge pages for a rollout, unless the user chose; read at torch's first allocation.

    Memory returned after each chunk is then reused at a cost of 1 to 4 %, not up to 20.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def thread_settings() -> str:
    """OpenMP's variables, marking those chosen here: `GOMP_SPINCOUNT=1000 (wancli)`."""
    settings = [
        f"{name}={text}{' (wancli)' if _chosen.get(name) == text else ''}"
        for name, text in sorted(os.environ.items())
        if name.startswith(_OPENMP)
    ]
    return ", ".join(settings) or "OpenMP's defaults"
