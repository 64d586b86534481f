"""Batches whose processes are killed: no job is lost, none is made twice, all files are whole."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from tests.fuzz import judge
from tests.fuzz.campaign import Case
from tests.fuzz.judge import Fault
from wancli.records.ledger import DONE, SKIPPED, open_ledger

SIZE, KILLS = 20, 5  # batches, and kills of each
CLIPS, ROLLOUTS = 10, 2
PATIENCE_S = 300.0  # for the first video, and for all that are left in the end
LINE = ("batch", "jobs.jsonl", "--workers", "2", "--json", "--output-dir", "videos")


def attempt(case: Case) -> Iterator[Fault]:
    """Kill the command or a worker at random moments, start it again, and let it end."""
    case.place.copy_in("tiny")
    _write_jobs(case.place.work / "jobs.jsonl")
    batch = KilledBatch(case)
    try:
        yield from batch.kill_and_complete()
    finally:
        batch.end()


def _write_jobs(path: Path) -> None:
    small = {"model": "tiny", "size": "32x32", "fps": 8}
    clip = {"steps": 1, "num_frames": 5, "prompt": "a circle", "seed": f"0-{CLIPS - 1}"}
    roll = {"command": "rollout", "chunk_frames": 2, "steps_list": "1000,500", "chunks": 3,
            "prompt": "a square", "seed": f"0-{ROLLOUTS - 1}"}  # fmt: skip
    path.write_text("".join(json.dumps(small | job) + "\n" for job in (clip, roll)))


class KilledBatch:
    """A batch, the processes that were seen working on it, and the videos that were done."""

    def __init__(self, case: Case) -> None:
        self.case, self.rng = case, case.rng
        self.ledger = case.place.work / "videos" / "jobs.ledger"
        self.process: subprocess.Popen[bytes] | None = None
        self.runs = 0
        self.workers: set[int] = set()
        self.made: dict[str, tuple[int, int]] = {}  # file number and time, once a job is done

    def kill_and_complete(self) -> Iterator[Fault]:
        """Kill `KILLS` times, complete the batch, and look at everything."""
        self._start()
        began = time.monotonic()
        while not self.look():
            time.sleep(0.1)
            if time.monotonic() - began > PATIENCE_S:
                yield Fault("hang", "before the first video", self._output("err"))
                return
        usual = time.monotonic() - began
        for _ in range(KILLS):
            time.sleep(self.rng.uniform(0.0, 1.2 * usual))
            self._kill_one()
            self.look()
        yield from self._complete()
        yield from self.check()

    def _start(self) -> None:
        """Start the command, unless it runs."""
        if self.process and self.process.poll() is None:
            return
        out, err = (self.case.place.output / f"{name}{self.runs}" for name in ("out", "err"))
        self.runs += 1
        command = [str(Path(sys.executable).parent / "wancli"), *LINE]
        with out.open("wb") as out_file, err.open("wb") as err_file:
            self.process = subprocess.Popen(
                command, cwd=self.case.place.work, env=self.case.variables(), stdout=out_file,
                stderr=err_file, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def _kill_one(self) -> None:
        """Kill the command or one of its workers, and start it again if it has ended."""
        self._start()
        if process := self.process:
            workers = _children(process.pid)
            self.workers |= workers
            victim = self.rng.choice([process.pid, *sorted(workers)])
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
            if victim == process.pid:
                process.wait()
        self._start()

    def look(self) -> int:
        """Note which videos are done; returns how many."""
        if self.ledger.exists():
            with open_ledger(self.ledger) as ledger:
                for row in ledger.rows(DONE, SKIPPED):
                    self.made.setdefault(row["output"], _identity(Path(row["output"])))
        return len(self.made)

    def _complete(self) -> Iterator[Fault]:
        """Run the command until all jobs are done; those that three workers died in fail first."""
        until = time.monotonic() + PATIENCE_S
        code = 3
        while code == 3 and time.monotonic() < until:
            self._start()
            if self.process is None:
                return
            try:
                code = self.process.wait(until - time.monotonic())
            except subprocess.TimeoutExpired:
                yield Fault("hang", "at the end", self._output("err"))
                return
        if code:
            yield Fault("exit code", str(code), self._output("err"))

    def check(self) -> Iterator[Fault]:
        """Look at all jobs, videos, lines and processes."""
        before = dict(self.made)
        if (done := self.look()) < CLIPS + ROLLOUTS:
            yield Fault("lost", f"{done} of {CLIPS + ROLLOUTS} jobs are done")
        for name in (name for name in before if _identity(Path(name)) != before[name]):
            yield Fault("twice", "a video was made again", name)
        for job in _printed_twice(self._output("out").splitlines()):
            yield Fault("twice", "a job was printed as made twice", str(job))
        files = [*map(Path, self.made), *self.ledger.parent.glob("*.json")]
        for path, fault in ((path, judge.defect(path)) for path in files):
            if fault:
                yield Fault("not whole", fault, str(path))
        if "Traceback" in (err := self._output("err")):
            yield Fault("traceback", judge.cause_of(err), err[-2000:])
        if left := [pid for pid in self.workers if _is_worker(pid)]:
            yield Fault("left", "a worker that is still running", str(left))

    def _output(self, stream: str) -> str:
        """What all runs have printed."""
        files = (self.case.place.output / f"{stream}{run}" for run in range(self.runs))
        return "".join(path.read_text(errors="replace") for path in files if path.exists())

    def end(self) -> None:
        """Kill what is left."""
        if self.process:
            self.workers |= _children(self.process.pid)
            self.process.kill()
            self.process.wait()
        for pid in filter(_is_worker, self.workers):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _printed_twice(lines: Iterable[str]) -> list[int]:
    """Jobs that several lines say were made; the last line of a killed process may be cut off."""
    records = [json.loads(line) for line in lines if line.endswith("}")]
    made = Counter(record["job"] for record in records if record["status"] == "ok")
    return [job for job, times in made.items() if times > 1]


def _identity(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_ino, found.st_mtime_ns


def _children(pid: int) -> set[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return set()
    return {child for child in map(int, text.split()) if _is_worker(child)}


def _is_worker(pid: int) -> bool:
    try:
        return b"worker_process" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
