"""Memory that a process has had, and returns to the system."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wancli.catalog.local import find_spec
from wancli.catalog.specs import SPECS
from wancli.config.settings import Machine
from wancli.errors import CapacityError, ModelError
from wancli.models.load import load_errors, load_pipeline
from wancli.models.memory import fits_in_memory, trim_heap

MIB = 2**20


def resident() -> int:
    """Resident memory of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
def test_freed_heap_is_returned_to_the_system():
    trim_heap()
    before = resident()
    blocks = [b"x" * 60_000 for _ in range(2000)]
    in_use = blocks[::100]
    del blocks
    fragmented = resident()
    trim_heap()
    after = resident()
    assert fragmented - before > 80 * MIB  # the heap keeps its holes, until they are returned
    assert after - before < 20 * MIB
    assert len(in_use) == 20


def test_the_peak_is_of_this_process_and_not_of_the_one_that_started_it():
    here = bytearray(b"x" * 300 * MIB)
    script = "from wancli.utils.heap import peak_ram; print(peak_ram())"
    peak = int(subprocess.check_output([sys.executable, "-c", script]))
    assert len(here) > 2 * peak > 0


RAN_OUT = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 24 GiB."),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 bytes."),
    MemoryError("Cannot allocate memory (os error 12)"),
]


@pytest.mark.parametrize("error", RAN_OUT)
def test_whatever_runs_out_of_memory_does_not_fit(error: Exception):
    for block in (fits_in_memory("demo"), load_errors(SPECS["demo"])):
        with pytest.raises(CapacityError, match="does not fit"), block:
            raise error


def test_other_errors_are_not_about_memory():
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal"), fits_in_memory("demo"):
        raise error
    with pytest.raises(ModelError, match="illegal"), load_errors(SPECS["demo"]):
        raise error


def test_a_gpu_without_memory_for_the_compiler_has_no_broken_compiler(
    monkeypatch: pytest.MonkeyPatch,
):
    def run_out(*_: object, **_options: object) -> None:
        raise RAN_OUT[0]

    monkeypatch.setattr(torch, "compile", run_out)
    with pytest.raises(CapacityError):
        load_pipeline(find_spec("demo"), Machine(compile=True, device="cpu"))
