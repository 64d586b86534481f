"""GPUs, CPU and memory of this machine, without importing torch."""

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Any

from wancli.catalog.gpus import find_gpu
from wancli.config.settings import Machine
from wancli.errors import no_device
from wancli.utils.packages import package_version

MEMORY = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup/memory.max")  # a container's limit


@dataclass(frozen=True)
class Device:
    """A GPU or CPU, with its memory in bytes."""

    kind: str  # cuda, mps or cpu
    name: str
    total: int
    free: int
    driver: str = ""
    here: bool = True  # in this machine, not only planned for

    @property
    def key(self) -> str:
        """Key of its measured rates: device and torch version, and a CPU's threads."""
        threads = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count())
        which = f"{self.name}, {threads} threads" if self.kind == "cpu" else self.name
        return f"{which}, torch {package_version('torch')}"


_seen: ContextVar[list[Device] | None] = ContextVar("seen", default=None)


def find_gpus() -> dict[str, Device]:
    """NVIDIA GPUs visible to this process, by their names for CUDA_VISIBLE_DEVICES.

    Like CUDA, it reads that variable up to the first name that is no GPU's. Which GPUs its UUIDs
    name is not known: the first ones stand for them.
    """
    gpus = _seen.get()
    gpus = _look_for_gpus() if gpus is None else gpus
    numbered = {str(number): gpu for number, gpu in enumerate(gpus)}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return numbered
    names = [name.strip() for name in visible.split(",")]
    if names[0].startswith(("GPU-", "MIG-")):
        return dict(zip(names, gpus, strict=False))
    return {name: numbered[name] for name in takewhile(numbered.__contains__, names)}


@contextmanager
def gpus_seen_once() -> Iterator[None]:
    """Look for GPUs once in the block: NVML takes a while, nvidia-smi longer."""
    token = _seen.set(_look_for_gpus())
    try:
        yield
    finally:
        _seen.reset(token)


def _look_for_gpus() -> list[Device]:
    gpus = _by_nvml()
    return _by_nvidia_smi() if gpus is None else gpus


def planned_device(gpu: str) -> Device:
    """A GPU to plan for, by size (`24GB`) or by name (`rtx4090`). Raises UsageError."""
    name, size = find_gpu(gpu)
    return Device("cuda", name, size, size, here=False)


def find_cpu() -> Device:
    """The CPU and its memory, within a container's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = total
    with suppress(OSError, ValueError, IndexError, StopIteration):
        lines = MEMORY.read_text("ascii").splitlines()
        free = 1024 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    with suppress(OSError, ValueError):
        total = min(total, int(CGROUP.read_text("ascii")))
    return Device("cpu", _processor(), total, min(free, total))


def find_device(machine: Machine) -> Device:
    """The device that `device` selects, as far as that is known without torch.

    Raises SetupError for one that the installed torch cannot support.
    """
    kind, _, number = machine.device.partition(":")
    with_cuda = not package_version("torch").endswith("+cpu")
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    if (kind == "cuda" and not with_cuda) or (kind == "mps" and not apple):
        raise no_device(machine.device)
    if kind in ("auto", "cuda") and with_cuda:
        gpus = [*find_gpus().values()]
        if int(number or 0) < len(gpus):
            return gpus[int(number or 0)]
    cpu = find_cpu()
    if kind == "mps" or (kind == "auto" and apple):
        return Device("mps", cpu.name, cpu.total, cpu.free)
    return cpu


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _by_nvml() -> list[Device] | None:
    """GPUs by NVML; None if it is unavailable."""
    try:
        nvml: Any = import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        driver = nvml.nvmlSystemGetDriverVersion()
        gpus = []
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            name = nvml.nvmlDeviceGetName(handle)
            gpus.append(Device("cuda", name, int(memory.total), int(memory.free), driver))
        return gpus
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()


def _by_nvidia_smi() -> list[Device]:
    program = shutil.which("nvidia-smi")
    if not program:
        return []
    query = "--query-gpu=name,memory.total,memory.free,driver_version"
    try:
        done = subprocess.run(
            [program, query, "--format=csv,noheader,nounits"],
            capture_output=True, encoding="utf-8", timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    return [gpu for line in done.stdout.splitlines() if (gpu := _gpu(line))]


def _gpu(line: str) -> Device | None:
    """Parse a line of nvidia-smi: name, total MiB, free MiB, driver."""
    words = [word.strip() for word in line.split(",")]
    if len(words) != 4 or not (words[1].isdigit() and words[2].isdigit()):
        return None
    return Device("cuda", words[0], int(words[1]) * 2**20, int(words[2]) * 2**20, words[3])
