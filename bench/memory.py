"""Whether a long rollout grows: resident memory from chunk 20 to chunk 200 of a real command.

`make bench-memory`.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from time import sleep

PROMPT = "a red circle moving right on a black background"
PAGE = 4096


def main() -> int:
    """Run the rollout, watch it, and print; 1 where it grew by more than 1 %."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("--chunks", type=int, default=200)
    parser.add_argument("--first", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "wancli", "rollout", PROMPT, "--seed", "1", "-q"]
        command += ["--chunks", str(given.chunks), "--steps", str(given.steps)]
        command += ["-o", f"{folder}/long.mp4"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        seen: dict[int, list[float]] = {}
        while process.poll() is None:
            done = len(list(Path(folder, "long.rollout").glob("chunk-*.safetensors")))
            try:
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            except (OSError, IndexError):
                break
            seen.setdefault(done, []).append(pages * PAGE / 2**20)
            sleep(0.02)
        if process.wait():
            return process.returncode
    around = given.first // 2  # a decode peaks and is over: the least of some chunks is what stays
    marks = range(given.first, given.chunks, given.first)
    held = {
        n: min(m for c in range(n - around, n + around) for m in seen.get(c, [])) for n in marks
    }
    sys.stdout.write("".join(f"around chunk {n:4}: {mib:8.1f} MiB\n" for n, mib in held.items()))
    last = max(held)
    growth = held[last] / held[marks[0]] - 1
    sys.stdout.write(f"from chunk {marks[0]} to chunk {last}: {growth:+.2%}\n")
    return 1 if growth > 0.01 else 0


if __name__ == "__main__":
    raise SystemExit(main())
