"""Freed memory that a process keeps, or returns to the system."""

import subprocess
import sys

import pytest

from wancli.utils.heap import glibc

PROGRAM = """
import resource, sys
from wancli.utils.heap import keep_heap
if sys.argv[1] == "keep":
    keep_heap()
del (block := [b"x" * 2**26])[:]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
del (block := [b"x" * 2**26])[:]
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize())
"""


@pytest.mark.skipif(glibc() is None, reason="other allocators are left alone")
@pytest.mark.parametrize(("heap", "paged_in"), [("keep", False), ("default", True)])
def test_kept_memory_is_not_paged_in_again(heap, paged_in):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, heap], capture_output=True, check=True, text=True
    )
    assert (int(done.stdout) > 2**25) is paged_in
