"""Resident memory of a long `wancli rollout`, from chunk 20 to chunk 200: `make bench-memory`."""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from time import sleep

PROMPT = "a red circle moving right on a black background"


def main() -> int:
    """Run a rollout and print its memory; returns 1 if it grew by more than 1 %."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--chunks", type=int, default=200)
    parser.add_argument("--first", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "wancli", "rollout", PROMPT, "--seed", "1", "-q"]
        command += ["--chunks", str(options.chunks), "--steps", str(options.steps)]
        command += ["-o", f"{folder}/long.mp4", *(["--compile"] if options.compile else [])]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        samples: dict[int, list[tuple[float, float]]] = {}
        while process.poll() is None:
            done = len(list(Path(folder, "long.rollout").glob("chunk-*.safetensors")))
            try:
                samples.setdefault(done, []).append(resident(process.pid))
            except (OSError, KeyError):
                break
            sleep(0.02)
        if process.wait():
            return process.returncode
    marks = range(options.first, options.chunks + 1, options.first)
    memory = {n: around(n, samples, radius=options.first // 2, end=options.chunks) for n in marks}
    for n, (now, peak) in memory.items():
        sys.stdout.write(f"around chunk {n:4}: {now:8.1f} MiB, peak so far {peak:8.1f} MiB\n")
    first, last = marks[0], marks[-1]
    now, peak = (b / a - 1 for a, b in zip(memory[first], memory[last], strict=True))
    sys.stdout.write(f"from chunk {first} to chunk {last}: {now:+.2%}, peak {peak:+.2%}\n")
    return 1 if now > 0.01 else 0


def resident(process: int) -> tuple[float, float]:
    """Resident memory and its peak in MiB."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines()
    )
    now, peak = (int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def around(
    mark: int, samples: dict[int, list[tuple[float, float]]], *, radius: int, end: int
) -> tuple[float, float]:
    """Minimum memory around chunk `mark` (decoding peaks briefly), and the peak so far, in MiB.

    Excludes the end, when the record is written.
    """
    near = [s for c in range(mark - radius, min(mark + radius, end)) for s in samples.get(c, [])]
    before = [s for c in range(min(mark + 1, end)) for s in samples.get(c, [])]
    return min(now for now, _ in near), max(peak for _, peak in before)


if __name__ == "__main__":
    raise SystemExit(main())
