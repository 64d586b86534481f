"""How many workers a batch's ledger serves, and the driver of a cluster: `make bench-scale`.

First the ledger's calls are timed as a worker makes them, with 1 to 64 real processes on one file.
Then 1 to 10,000 workers are simulated with those times: each takes a job, notes now and then that
it goes on, and notes its end; they die, and their jobs are made again. Whoever writes to the ledger
waits for who does so already; that is the only thing that is shared.

How job times spread is measured on the demo model, as a ratio to their median; the medians are
given. 2.4 s is a measured one: 81 frames in few steps on an H200 (results/h200.json, case 9).
"""

import argparse
import heapq
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import count
from multiprocessing import Process, Queue
from pathlib import Path
from statistics import fmean, median, quantiles
from time import perf_counter, process_time
from typing import Any

from wancli.records.ledger import ClaimedJob, create_ledger, open_ledger
from wancli.records.ledger_file import LedgerJob, LedgerSettings
from wancli.records.ledger_worker import LedgerWorker

PROCESSES = (1, 2, 4, 8, 16, 32, 64)
WORKERS = (1, 8, 64, 256, 1_000, 4_000, 10_000)
MEDIANS_S = (0.5, 2.4, 60.0, 600.0)  # of a job
BEAT_S = 5.0  # between notes that a job goes on, as batches/worker.py has it
CALLS = ("free_abandoned", "claim", "beat", "done")
DEATH_S, RESTART_S = 24 * 3600.0, 60.0  # of a worker: mean time until it dies, and to load again
# Of a job to the driver, where it is busy: an actor drops events when 8 wait (remote_maker.py).
MESSAGES = 9
RECORD = {"request": {"settings": "x" * 3000}, "timings": {"total_s": 1.0}}  # as long as a real one


@dataclass(frozen=True)
class Calls:
    """Times in seconds of calls by several processes, and jobs a second of all of them."""

    processes: int
    jobs_per_s: float
    seconds: dict[str, list[float]]


@dataclass(frozen=True)
class Simulated:
    """What came of some workers: the share of time in which they worked."""

    workers: int
    working: float
    writing: float  # share of time in which somebody wrote
    deaths: int


def main() -> int:
    """Measure, simulate and print tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each number of processes")
    parser.add_argument("--jobs", type=int, default=100_000, help="in the ledger")
    parser.add_argument("--videos", type=int, default=24, help="demo videos for the spread")
    parser.add_argument("--most", type=int, default=PROCESSES[-1], help="processes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spread = demo_spread(Path(folder), options.videos)
        low, _, high = quantiles(spread, n=4)
        most = max(spread)
        say(f"demo jobs: quartiles {low:.2f} and {high:.2f} of the median, slowest {most:.2f}")
        rows = [
            measure(Path(folder), count, jobs=options.jobs, seconds=options.seconds)
            for count in PROCESSES
            if count <= options.most
        ]
    calls_table(rows)
    alone = {name: fmean(rows[0].seconds[name]) for name in CALLS}
    checks = per_worker(rows)
    say(f"\nfree_abandoned takes {1e6 * checks:.0f} us more for each worker that runs a job\n")
    say("workers that write themselves (one machine)\n")
    simulated_table(spread, alone, checks=checks)
    if costs := driver_costs():
        each, more = costs
        say(
            f"\nRay: {1e3 * each:.2f} ms of the driver a message, {1e6 * more:.1f} us more an actor"
        )
        say(f"one driver that writes for all, {MESSAGES} messages a job\n")
        simulated_table(spread, alone | {"free_abandoned": MESSAGES * each}, checks=MESSAGES * more)
    return 0


def say(text: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def demo_spread(folder: Path, count: int) -> list[float]:
    """Times of demo jobs in one process, as ratios to their median; the first loads the model."""
    import wancli

    with wancli.load("demo") as model:
        times = []
        for seed in range(count + 1):
            began = perf_counter()
            output = folder / f"{seed}.mp4"
            model.generate("a red circle", seed=seed, steps=2, num_frames=5, output=output)
            times.append(perf_counter() - began)
    usual = median(times[1:])
    return [spent / usual for spent in times[1:]]


def measure(folder: Path, processes: int, *, jobs: int, seconds: float) -> Calls:
    """Let processes take jobs that take no time."""
    path, output = folder / f"{processes}.ledger", folder / "video.mp4"
    output.write_bytes(b"video")
    settings = [LedgerSettings(0, "generate", {"steps": 20})]
    rows = (LedgerJob(n, 0, "a red circle", n, str(output)) for n in range(jobs))
    create_ledger(path, "d", settings, rows, version="1").close()
    results: Queue[dict[str, list[float]]] = Queue()
    # Forks, each of which opens the ledger itself.
    workers = [Process(target=_work, args=(path, seconds, results)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    answers = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    times = {name: [t for answer in answers for t in answer[name]] for name in CALLS}
    return Calls(processes, len(times["done"]) / seconds, times)


def _work(path: Path, seconds: float, results: Any) -> None:
    times: dict[str, list[float]] = {name: [] for name in CALLS}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        began = perf_counter()
        value = call()
        times[name].append(perf_counter() - began)
        return value

    with open_ledger(path) as ledger:
        worker = LedgerWorker(ledger)
        end = perf_counter() + seconds
        while perf_counter() < end:
            timed("free_abandoned", ledger.free_abandoned)
            job: ClaimedJob | None = timed("claim", worker.claim)
            if job is None:
                break
            timed("beat", partial(worker.beat, job))
            timed("done", partial(worker.done, job, RECORD))
        worker.close()
    results.put(times)


def driver_costs() -> tuple[float, float] | None:
    """Seconds of a driver's process for a message, and more for each actor that may send one.

    None without Ray. Of its time and not by the clock, as the actors here share its cores.
    """
    try:
        ray: Any = import_module("ray")
    except ImportError:
        say("\nno Ray: pip install ray")
        return None
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")

    class Actor:
        def make(self, job: dict[str, Any]) -> dict[str, Any]:
            return {**RECORD, "job": job}

    remote: Any = ray.remote(num_cpus=0)(Actor)
    actors = [remote.remote() for _ in range(4)]
    ray.get([actor.make.remote({}) for actor in actors])

    def each(under_way: int, jobs: int = 1500) -> float:
        def start(number: int) -> Any:
            job = {"prompt": "a red circle", "seed": number}
            return actors[number % len(actors)].make.remote(job)

        running = [start(number) for number in range(under_way)]
        began = process_time()
        for number in range(jobs):
            (done,), running = ray.wait(running)
            ray.get(done)
            running.append(start(number))
        spent = process_time() - began
        ray.get(running)
        return spent / jobs

    few, many = each(4), each(404)
    ray.shutdown()
    return few, max(0.0, (many - few) / 400)


def per_worker(rows: Sequence[Calls]) -> float:
    """Seconds by which looking for dead workers grows with each worker, by least squares."""
    counts = [row.processes for row in rows]
    # Medians: a mean is that of the queue for the two cores.
    times = [median(row.seconds["free_abandoned"]) for row in rows]
    x, y = fmean(counts), fmean(times)
    slope = sum((a - x) * (b - y) for a, b in zip(counts, times, strict=True))
    return max(0.0, slope / (sum((a - x) ** 2 for a in counts) or 1.0))


def calls_table(rows: Sequence[Calls]) -> None:
    """Print median and 99th percentile of each call."""
    say("\nmedian in ms, and the 99th percentile\n")
    say(f"| processes | jobs a second |{'|'.join(f' {name} ' for name in CALLS)}|")
    say(f"|---:|---:|{'---:|' * len(CALLS)}")
    for row in rows:
        cells = []
        for name in CALLS:
            ordered = sorted(row.seconds[name])
            late = ordered[int(0.99 * (len(ordered) - 1))]
            cells.append(f" {1e3 * median(ordered):.2f} ({1e3 * late:.1f}) ")
        say(f"| {row.processes} | {row.jobs_per_s:,.0f} |{'|'.join(cells)}|")


def simulated_table(spread: Sequence[float], costs: dict[str, float], *, checks: float) -> None:
    """Print the share of time that simulated workers work."""
    say(f"| workers |{'|'.join(f' jobs of {s:g} s ' for s in MEDIANS_S)}|")
    say(f"|---:|{'---:|' * len(MEDIANS_S)}")
    for workers in WORKERS:
        cells = []
        for usual in MEDIANS_S:
            one = simulate(workers, [usual * ratio for ratio in spread], costs, checks=checks)
            cells.append(f" {one.working:.1%} ({one.writing:.1%}) ")
        say(f"| {workers:,} |{'|'.join(cells)}|")


def simulate(
    workers: int, times: Sequence[float], costs: dict[str, float], *, checks: float, seed: int = 1
) -> Simulated:
    """Simulate workers that share one ledger, to which one at a time writes; jobs never run out.

    `costs` has the seconds of each call alone, and `checks` those by which looking for dead workers
    grows with each worker. Counts the second half of the time, when all are out of step.
    """
    chance = random.Random(seed)
    end = 6 * median(times) + 6 * workers * (sum(costs.values()) + checks * workers)
    half = end / 2
    taking = costs["free_abandoned"] + checks * workers + costs["claim"]
    free_at, working, writing, deaths = 0.0, 0.0, 0.0, 0
    ties = count()
    # (time, tie, what is called, seconds of the job that are left)
    events = [(0.0, next(ties), "claim", 0.0) for _ in range(workers)]
    while True:
        at, _, call, left = heapq.heappop(events)
        if at > end:
            return Simulated(workers, working / workers / half, writing / half, deaths)
        if call == "dead":
            deaths += 1
            heapq.heappush(events, (at + RESTART_S, next(ties), "claim", 0.0))
            continue
        spent = taking if call == "claim" else costs[call]
        began, free_at = max(at, free_at), max(at, free_at) + spent
        writing += _overlap(began, free_at, half, end)
        if call == "done":
            heapq.heappush(events, (free_at, next(ties), "claim", 0.0))
            continue
        if call == "claim":
            left = chance.choice(times)
            death = chance.expovariate(1 / DEATH_S)
            if death < left:  # what it did is lost
                heapq.heappush(events, (free_at + death, next(ties), "dead", 0.0))
                continue
        part, following = (BEAT_S, "beat") if left > BEAT_S else (left, "done")
        working += _overlap(free_at, free_at + part, half, end)
        heapq.heappush(events, (free_at + part, next(ties), following, left - part))


def _overlap(began: float, ended: float, first: float, last: float) -> float:
    return max(0.0, min(ended, last) - max(began, first))


if __name__ == "__main__":
    sys.exit(main())
