"""Slow-down of `wancli generate` on a busy machine: `make bench-threads`.

Each try shows how long the threads spun, which wancli chooses by the load it finds.
The demo with OpenMP's defaults (before) and with wancli's settings (now), interleaved: on an idle
machine, with a busy process on every core, and with one on one core. Ratios are to the median time
of the same setting on the idle machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter

CORES = sorted(os.sched_getaffinity(0))
PLACES = {"idle": [], "every": CORES, "one": CORES[:1]}  # cores with a pinned busy process
SETTINGS = {"before": {"GOMP_SPINCOUNT": "300000"}, "now": {}}  # libgomp's default, and ours
GOALS = {"every": 2.5, "one": 1.7}  # maximum ratio to idle, in every try
IDLE_GOAL = 1.03  # maximum ratio of the minima, now to before
PROMPT = "a red circle moving right on a black background"


def main() -> int:
    """Measure, and print every try and the ratios; returns 1 if a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.threads", description=__doc__)
    parser.add_argument("--tries", type=int, default=10)
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    args = parser.parse_args()
    seconds: dict[tuple[str, str], list[float]] = {}
    for attempt in range(args.tries):
        for place in args.places:
            for name in args.settings:
                with busy(PLACES[place]):
                    duration, spins = generate(SETTINGS[name])
                seconds.setdefault((place, name), []).append(duration)
                show(f"try {attempt + 1:2}  {place:5}  {name:6}  {duration:6.2f} s  {spins}")
    return 0 if judge(seconds) else 1


def judge(seconds: dict[tuple[str, str], list[float]]) -> bool:
    """Print minimum, median and maximum everywhere, and their ratios to idle if measured."""
    good = True
    for (place, name), times in seconds.items():
        line = f"{place:5}  {name:6}  {min(times):6.2f} {median(times):6.2f} {max(times):6.2f} s"
        if place != "idle" and (idle := seconds.get(("idle", name))):
            ratios = [time / median(idle) for time in (min(times), median(times), max(times))]
            line += "  " + " ".join(f"{ratio:5.2f}x" for ratio in ratios)
            good &= name != "now" or ratios[-1] <= GOALS[place]
        show(line)
    if {("idle", "now"), ("idle", "before")} <= set(seconds):
        ratio = min(seconds["idle", "now"]) / min(seconds["idle", "before"])
        show(f"idle, now to before, minimum of each: {ratio:.3f}x")
        good &= ratio <= IDLE_GOAL
    return good


@contextmanager
def busy(cores: list[int]) -> Iterator[None]:
    """Run a busy loop on each of these cores."""
    loop = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
    running = [subprocess.Popen([sys.executable, "-c", loop, str(core)]) for core in cores]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def generate(variables: dict[str, str]) -> tuple[float, str]:
    """Seconds of one `wancli generate`, as a whole process, and the record's words on threads."""
    others = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "wancli", "generate", PROMPT, "--seed", "1", "-q"]
        command += ["-o", f"{folder}/a.mp4"]
        started = perf_counter()
        subprocess.run(command, env=others | variables, check=True, stdout=subprocess.DEVNULL)
        duration = perf_counter() - started
        return duration, json.loads(Path(f"{folder}/a.json").read_text())["env"]["threads"]


def show(line: str) -> None:
    """Print a line at once, in case the benchmark is interrupted."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
