"""Whether a busy machine slows a video down by more than its share: `make bench-threads`.

The same `wancli generate` of the demo with OpenMP's defaults (before) and as wancli chooses (now),
in turns: where nothing else runs, beside a busy process on every core, and beside one on one core.
A ratio is to the middle time of the same setting where nothing else runs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from time import perf_counter

CORES = sorted(os.sched_getaffinity(0))
PLACES = {"idle": [], "every": CORES, "one": CORES[:1]}  # cores with a busy process, pinned
SETTINGS = {"before": {"GOMP_SPINCOUNT": "300000"}, "now": {}}  # GNU's own default, and ours
GOALS = {"every": 2.5, "one": 1.7}  # times as long as idle, at most, in every try
IDLE_GOAL = 1.03  # times as long as before, of the shortest
PROMPT = "a red circle moving right on a black background"


def main() -> int:
    """Measure, print every try, and the ratios; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.threads", description=__doc__)
    parser.add_argument("--tries", type=int, default=10)
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    given = parser.parse_args()
    seconds: dict[tuple[str, str], list[float]] = {}
    for attempt in range(given.tries):
        for place in given.places:
            for name in given.settings:
                with busy(PLACES[place]):
                    took = generate(SETTINGS[name])
                seconds.setdefault((place, name), []).append(took)
                say(f"try {attempt + 1:2}  {place:5}  {name:6}  {took:6.2f} s")
    return 0 if judge(seconds) else 1


def judge(seconds: dict[tuple[str, str], list[float]]) -> bool:
    """Print least, middle and most of every place, as ratios where idle was measured."""
    good = True
    for (place, name), took in seconds.items():
        line = f"{place:5}  {name:6}  {min(took):6.2f} {median(took):6.2f} {max(took):6.2f} s"
        if place != "idle" and (idle := seconds.get(("idle", name))):
            ratios = [time / median(idle) for time in (min(took), median(took), max(took))]
            line += "  " + " ".join(f"{ratio:5.2f}x" for ratio in ratios)
            good &= name != "now" or ratios[-1] <= GOALS[place]
        say(line)
    if {("idle", "now"), ("idle", "before")} <= set(seconds):
        ratio = min(seconds["idle", "now"]) / min(seconds["idle", "before"])
        say(f"idle, now to before, the shortest of each: {ratio:.3f}x")
        good &= ratio <= IDLE_GOAL
    return good


@contextmanager
def busy(cores: list[int]) -> Iterator[None]:
    """A process that never rests on each of these cores."""
    endless = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
    running = [subprocess.Popen([sys.executable, "-c", endless, str(core)]) for core in cores]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def generate(variables: dict[str, str]) -> float:
    """Seconds of one command, from its start to its end."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "wancli", "generate", PROMPT, "--seed", "1", "-q"]
        command += ["-o", f"{folder}/a.mp4"]
        began = perf_counter()
        subprocess.run(command, env=ours | variables, check=True, stdout=subprocess.DEVNULL)
        return perf_counter() - began


def say(line: str) -> None:
    """Print it now: a bench that is cut short has said what it knows."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
