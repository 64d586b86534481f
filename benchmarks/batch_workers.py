"""Memory of a batch's worker, and Ray's actors against worker processes: `make bench-workers`.

The videos are those of the demo model. Both engines start two workers of one thread each; the time
counts from the moment when each has made its first video, which includes loading.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import sleep

from benchmarks.memory import resident
from wancli.records.ledger import open_ledger

WORKERS = 2
GROWTH, SLOWER = 0.02, 0.10  # at most


def main() -> int:
    """Measure what is chosen; returns 1 if memory grows, or Ray is slower than it should be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch_workers", description=__doc__)
    parser.add_argument("what", choices=("memory", "ray"))
    parser.add_argument("--jobs", type=int, help="200 for memory, 20 for Ray")
    parser.add_argument("--steps", type=int, help="1 for memory, else the demo's")
    parser.add_argument("--num-frames", type=int, help="5 for memory, else the demo's")
    parser.add_argument("--turns", type=int, default=3, help="of each engine")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        tiny = options.what == "memory"
        count = options.jobs or (200 if tiny else 20)
        chosen = {"steps": options.steps, "num_frames": options.num_frames}
        settings = {name: value for name, value in chosen.items() if value is not None}
        usual = {"steps": 1, "num_frames": 5} if tiny else {}
        job = {**usual, **settings, "prompt": "a red circle", "seed": f"0-{count - 1}"}
        Path("jobs.jsonl").write_text(json.dumps(job))
        return memory(count) if tiny else ray(options.turns)


def memory(count: int) -> int:
    """Resident memory of a worker as its videos are done."""
    process = start("memory", "--workers", "1")
    samples: dict[int, float] = {}
    while process.poll() is None:
        done = len(list(Path("memory").glob("*.mp4")))
        with suppress(OSError, KeyError, IndexError):  # it has ended
            now = resident(children(process.pid)[0])[0]
            samples[done] = min(samples.get(done, now), now)
        sleep(0.05)
    marks = sorted({count // 10, count // 2, count * 9 // 10})
    around = {mark: least(samples, mark, count // 20) for mark in marks}
    for mark, mib in around.items():
        line(f"around video {mark}", f"{mib:.1f} MiB")
    growth = around[marks[-1]] / around[marks[1]] - 1  # the allocator has what it keeps by then
    line("growth of the second half", f"{growth:+.2%}")
    return process.returncode or int(growth > GROWTH)


def least(samples: dict[int, float], mark: int, radius: int) -> float:
    """Least memory around a video: decoding peaks briefly."""
    return min(mib for done, mib in samples.items() if abs(done - mark) <= radius)


def ray(turns: int) -> int:
    """Time both engines in turn."""
    from ray.cluster_utils import Cluster

    os.environ.update(RAY_worker_niceness="0")  # worker processes have none either
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    cluster.add_node(num_cpus=WORKERS)
    engines = {"workers": (), "ray": ("--engine", "ray", "--address", cluster.address)}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    try:
        for turn in range(turns):
            for name, flags in engines.items():
                folder = f"{name}{turn}"
                process = start(folder, "--workers", str(WORKERS), *flags)
                if process.wait():
                    return process.returncode
                seconds[name].append(after_start(Path(folder)))
                line(f"{name}, turn {turn + 1}", f"{seconds[name][-1]:.3f} s a video")
    finally:
        cluster.shutdown()
    slower = min(seconds["ray"]) / min(seconds["workers"]) - 1
    line("ray against workers", f"{slower:+.1%}")
    return int(slower > SLOWER)


def after_start(folder: Path) -> float:
    """Seconds a video, from when each worker has made one."""
    with open_ledger(folder / "jobs.ledger") as ledger:
        ended = sorted(row["ended"] for row in ledger.rows("done"))
    return float((ended[-1] - ended[WORKERS - 1]) / (len(ended) - WORKERS))


def start(folder: str, *flags: str) -> subprocess.Popen[bytes]:
    """Start a batch of the jobs, whose videos and ledger are in the folder."""
    command = [sys.executable, "-m", "wancli", "batch", "jobs.jsonl", "--output-dir", folder, "-q"]
    return subprocess.Popen(
        [*command, *flags], stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def children(pid: int) -> Sequence[int]:
    """Child processes."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def line(what: str, value: str) -> None:
    """Print a measurement."""
    sys.stdout.write(f"{what:26} {value}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
