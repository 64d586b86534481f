"""How torch's threads on the CPU wait for each other, chosen before torch loads.

Torch's wheels for Linux carry GNU's OpenMP, and MKL and oneDNN in them work through it. Its threads
spin at the end of every loop, by default for milliseconds: as long as another process has its turn,
so that beside one they wait for each other most of the time. Tens of microseconds (1000 rounds) are
as fast where nothing else runs, and give the core away where something does (make bench-threads).
"""

import os
import sys

_OPENMP = ("OMP_", "GOMP_", "KMP_", "MKL_")
_WAITING = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}  # either decides how long threads spin
_SPINCOUNT = "1000"

_chosen: dict[str, str] = {}


def choose_threads() -> None:
    """Set the environment that OpenMP reads when it is loaded; what the user set stays."""
    if "torch" not in sys.modules and not _WAITING & set(os.environ):
        _chosen["GOMP_SPINCOUNT"] = os.environ["GOMP_SPINCOUNT"] = _SPINCOUNT


def thread_settings() -> str:
    """OpenMP's variables, and which of them we chose: `GOMP_SPINCOUNT=1000 (wancli)`."""
    found = {name: text for name, text in sorted(os.environ.items()) if name.startswith(_OPENMP)}
    settings = [
        f"{name}={text}{' (wancli)' if _chosen.get(name) == text else ''}"
        for name, text in found.items()
    ]
    return ", ".join(settings) or "OpenMP's defaults"
