"""What a process holds, and gives back."""

import platform
from pathlib import Path

import pytest

from wancli.models.memory import trim_heap

MIB = 2**20


def resident() -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
def test_freed_heap_is_returned_to_the_system():
    trim_heap()
    before = resident()
    blocks = [b"x" * 60_000 for _ in range(2000)]
    in_use = blocks[::100]
    del blocks
    held = resident()
    trim_heap()
    after = resident()
    assert held - before > 80 * MIB  # the holes are kept: this is what is to be given back
    assert after - before < 20 * MIB
    assert len(in_use) == 20
