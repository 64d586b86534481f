"""Many videos in one batch against one by one, and planning a long file: `make bench-batch`.

The videos are those of the demo model. Ratios are of times in one run on one machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from subprocess import PIPE
from time import perf_counter, process_time
from typing import Any

from wancli.records.ledger import create_ledger, open_ledger
from wancli.utils.heap import peak_ram
from wancli.utils.units import gib

WORDS = ["a", "red", "blue", "circle", "square", "moving", "bouncing", "slowly", "right", "brown"]


def main() -> int:
    """Measure what is chosen and print a line each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch", description=__doc__)
    parser.add_argument("what", choices=("plan", "videos"), nargs="?", default="videos")
    parser.add_argument("--jobs", type=int, help="100,000 to plan, 50 videos")
    parser.add_argument("--steps", type=int, help="the demo's, unless set")
    parser.add_argument("--num-frames", type=int, help="the demo's, unless set")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        if options.what == "plan":
            plan(options.jobs or 100_000)
        else:
            settings = {"steps": options.steps, "num_frames": options.num_frames}
            videos(options.jobs or 50, {n: v for n, v in settings.items() if v is not None})
    return 0


def plan(count: int) -> None:
    """Read, check and name the jobs of a file, and write their ledger."""
    from wancli.api.requests import Listener
    from wancli.batches.jobs import JOB_KEYS
    from wancli.batches.outputs import check_new
    from wancli.batches.plan import plan_batch
    from wancli.planning.jobs import read_jobs

    path = Path("jobs.jsonl")
    with path.open("w") as file:
        for number in range(count):
            words = [WORDS[(number // 10 ** (place % 5) + place) % 10] for place in range(25)]
            job = {"prompt": f"{number} {' '.join(words)}", "seed": number, "steps": 4 + number % 4}
            file.write(f"{json.dumps(job)}\n")
    line("lines", f"{count:,} of {path.stat().st_size / count:.0f} bytes")
    started, worked = perf_counter(), process_time()

    def spent(what: str) -> None:
        line(what, f"{perf_counter() - started:.2f} s, {process_time() - worked:.2f} CPU s")

    batch = read_jobs(path, JOB_KEYS)
    spent("read")
    planned = plan_batch(batch, Path("videos"), Listener(None))
    spent("planned and named")
    check_new(batch, planned.settings, planned.jobs)
    spent("outputs checked")
    create_ledger(
        Path("b.ledger"), batch.digest, planned.settings, planned.jobs, version="1"
    ).close()
    spent("ledger written")
    line("memory", gib(peak_ram()))


def videos(count: int, settings: dict[str, int]) -> None:
    """Make videos by a command each, by one batch, and one by one on a loaded model.

    The last is the in-process time: what the others add to it is starting and bookkeeping.
    """
    import wancli

    prompts = [f"a {WORDS[1 + number % 2]} circle bouncing" for number in range(count)]
    flags = [text for n, v in settings.items() for text in (f"--{n.replace('_', '-')}", str(v))]
    alone = sum(
        timed("generate", prompt, "--seed", str(n), *flags, "-o", f"alone-{n}.mp4")
        for n, prompt in enumerate(prompts)
    )
    line("separate commands", f"{alone:.1f} s for {count}")
    jobs = ({"prompt": prompt, "seed": n, **settings} for n, prompt in enumerate(prompts))
    Path("jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)))
    batch = timed("batch", "jobs.jsonl", "--output-dir", "batch")
    line("one batch", f"{batch:.1f} s, {alone / batch:.2f} times as fast")
    options: Any = settings
    with wancli.load("demo") as model:
        model.generate(prompts[0], seed=0, output="warm.mp4", **options)  # the first is slower
        started = perf_counter()
        for number, prompt in enumerate(prompts):
            model.generate(prompt, seed=number, output=f"loaded-{number}.mp4", **options)
        loaded = perf_counter() - started
    line(
        "on a loaded model",
        f"{loaded:.1f} s; the batch, with its start, {batch / loaded:.3f} times",
    )
    with open_ledger(Path("batch/jobs.ledger")) as ledger:
        rows = list(ledger.rows("done"))
    inside = rows[-1]["ended"] - rows[0]["ended"]
    making = sum(json.loads(row["record"])["timings"]["total_s"] for row in rows[1:])
    line(
        "between its videos", f"{inside - making:.2f} of {inside:.1f} s, {inside / making - 1:.1%}"
    )


def timed(*arguments: str) -> float:
    """Seconds of a command."""
    started = perf_counter()
    subprocess.run([sys.executable, "-m", "wancli", *arguments, "-q"], check=True, stdout=PIPE)
    return perf_counter() - started


def line(name: str, text: str) -> None:
    """Print a measurement."""
    sys.stdout.write(f"{name:24}{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
