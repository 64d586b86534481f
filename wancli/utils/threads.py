"""Environment of a process of our own, chosen before torch loads: its threads and its memory.

A library leaves these to the program that imports it: only the command line chooses.

Torch's Linux wheels bundle GNU OpenMP, which MKL and oneDNN use, too. Its threads spin at the end
of every parallel loop, by default for milliseconds: about a scheduler time slice, so beside another
busy process they mostly wait for each other. Tens of microseconds (1000 spins) yield the core to
it. On cores that are idle otherwise a longer wait saves a few percent, so whether they are is
measured while the command is read and planned (make bench-threads).
"""

import math
import os
import sys
from pathlib import Path
from time import monotonic

_OPENMP = ("OMP_", "GOMP_", "KMP_", "MKL_")
_WAITING = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}  # either sets how long threads spin
_SPINS, _IDLE_SPINS = "1000", "30000"
_IDLE = 0.25  # cores that others may use of ours
_LEAST_S = 0.1  # a shorter time says little: the kernel counts hundredths of a second
_STAT = Path("/proc/stat")

_chosen: dict[str, str] = {}
_first: list[tuple[float, float]] = []  # time, and seconds that others had worked by then


def choose_threads() -> None:
    """Set OpenMP's environment before it is loaded, unless the user did; measure from now on."""
    if "torch" not in sys.modules and not _WAITING & set(os.environ):
        _choose(_SPINS)
        _first[:] = [(monotonic(), _work_of_others())]


def choose_idle_threads() -> None:
    """Choose anew just before torch loads: a longer wait if our cores have been idle."""
    for began, before in _first if "torch" not in sys.modules else ():
        elapsed = monotonic() - began
        if elapsed >= _LEAST_S and _work_of_others() - before < _IDLE * elapsed:
            _choose(_IDLE_SPINS)


def _choose(spins: str) -> None:
    _chosen["GOMP_SPINCOUNT"] = os.environ["GOMP_SPINCOUNT"] = spins


def _work_of_others() -> float:
    """Seconds that other processes have worked on our cores since boot; inf where unknown."""
    try:
        lines = [line.split() for line in _STAT.read_text().splitlines()]
        ours = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        ticks = [list(map(int, line[1:9])) for line in lines if line[0] in ours]
        busy = sum(sum(core) - core[3] - core[4] for core in ticks)  # neither idle nor at disks
        return busy / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])  # ours, and our children's
    except (OSError, ValueError, IndexError, AttributeError):  # no Linux
        return math.inf


def choose_pages() -> None:
    """Use huge pages for a rollout, unless the user chose; read at torch's first allocation.

    Memory returned after each chunk is then reused at a cost of 1 to 4 %, not up to 20.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def share_of_threads(count: int) -> dict[str, str]:
    """Variables that give each of `count` processes its share of our cores, unless the user chose.

    With all threads each, processes on the same cores mostly wait for each other.
    """
    chosen = any(name in os.environ for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))
    if count < 2 or chosen:
        return {}
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // count))}


def thread_settings() -> str:
    """OpenMP's variables, marking those chosen here: `GOMP_SPINCOUNT=1000 (wancli)`."""
    settings = [
        f"{name}={text}{' (wancli)' if _chosen.get(name) == text else ''}"
        for name, text in sorted(os.environ.items())
        if name.startswith(_OPENMP)
    ]
    return ", ".join(settings) or "OpenMP's defaults"
