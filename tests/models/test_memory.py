"""Memory that a process has had, and returns to the system."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from wancli.models.memory import trim_heap

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
