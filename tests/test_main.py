"""`wancli` as a process: where it starts, and how it ends."""

import subprocess
import sys

PROGRAM = """
import atexit, os, sys
from wancli.__main__ import main

class Kept:
    def __del__(self, write=os.write):
        write(1, b"taken apart")

sys.kept, sys.argv = Kept(), ["wancli", "nosuch"]
try:
    main()
finally:
    sys.stdout.write("not flushed" + " " * 9)
    atexit.register(print, "at exit", end="")
"""


def test_it_ends_with_its_code_once_output_is_written_and_nothing_is_taken_apart():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, check=False, text=True
    )
    assert (done.returncode, done.stdout.split("  ")[0]) == (2, "not flushed")
    assert done.stdout.endswith(" at exit")
    assert done.stderr.startswith("error: No such command")


def test_windows_is_refused_before_what_it_lacks_is_imported():
    program = "import pathlib, os; os.name = 'nt'; import wancli.__main__"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=False, text=True
    )
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith("error: wancli runs on Linux and macOS, not on Windows")
    assert "WSL" in done.stderr
