"""Worker processes of a batch: one for each GPU, each with its model; who dies is replaced.

They are started anew, not forked, and open the ledger themselves. This process makes no video and
never imports torch.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from time import monotonic
from typing import Any

from wancli.batches.worker import JobOutcome
from wancli.batches.worker_process import (
    GRACE_S,
    ActorMessage,
    JobStarted,
    Message,
    WorkerFailed,
    WorkerWarning,
)
from wancli.cost.devices import find_gpus
from wancli.errors import RunError, SetupError, UsageError
from wancli.records.ledger import DONE, FAILED, MOST_DEATHS, SKIPPED, ClaimedJob, Ledger, died_error
from wancli.utils.interrupts import tidied
from wancli.utils.packages import check_package, package_version
from wancli.utils.threads import share_of_threads

_LEAST_RAY = (2, 60)
_LOOK_S = 1.0  # between looks at the ledger while no worker says anything
# Neither the folder of the command nor that of a script may hide a module of ours.
_START = (
    "import signal, sys, json; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "sys.path[:] = json.loads(sys.argv[1]); from {program} import main; main(*sys.argv[2:])"
)
PROGRAM, RAY_PROGRAM = "wancli.batches.worker_process", "wancli.batches.ray_driver"


@dataclass(frozen=True)
class WorkerPlace:
    """Where a worker runs: a name for people, and variables of its environment."""

    name: str
    variables: Mapping[str, str]
    program: str = PROGRAM


OnMessage = Callable[[int, Message], object]  # with the number of the worker's place


def worker_places(workers: int | None, devices: Sequence[int] = ()) -> list[WorkerPlace]:
    """A place for each worker; one for each GPU, else one. Raises UsageError, SetupError.

    More workers than GPUs share them in turn. `devices` are numbers as nvidia-smi counts them, of
    those that CUDA_VISIBLE_DEVICES leaves.
    """
    gpus = [] if package_version("torch").endswith("+cpu") else [*find_gpus()]
    for number in devices:
        if number >= len(gpus):
            there = f"GPUs 0 to {len(gpus) - 1}" if gpus else "no GPU"
            raise SetupError(f"`devices {number}`: this machine has {there}.", hint="wancli doctor")
    if len(set(devices)) < len(devices):
        raise UsageError("`devices` has a GPU twice.", hint="`workers`, for several on each")
    chosen = [gpus[number] for number in devices] or gpus
    count = workers or len(chosen) or 1
    share = share_of_threads(count)
    places = []
    for number in range(count):
        gpu = chosen[number % len(chosen)] if chosen else None
        visible = {"CUDA_VISIBLE_DEVICES": gpu, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if gpu else {}
        name = f"gpu {gpu}" if gpu and count <= len(chosen) else f"worker {number}"
        places.append(WorkerPlace(name, visible | share))
    return places


def ray_place() -> WorkerPlace:
    """The place of the process that drives a Ray cluster. Raises SetupError without Ray."""
    check_package("ray", _LEAST_RAY, needed_by="`engine ray`")
    return WorkerPlace("ray", {}, RAY_PROGRAM)


class _WorkerProcess:
    """A process that works, and the job that it has."""

    def __init__(self, number: int, place: WorkerPlace, arguments: Sequence[str]) -> None:
        self.number, self.place = number, place
        self.job: ClaimedJob | None = None  # whose outcome has not come
        self.ended = False
        self.receiver, sender = Pipe(duplex=False)
        file = sender.fileno()
        ledger, options = arguments
        start = _START.format(program=place.program)
        command = [sys.executable, "-P", "-c", start, json.dumps(sys.path), ledger, str(file)]
        # Ctrl-C is for this process alone, from the worker's first moment on.
        masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process = subprocess.Popen(
                [*command, options], env=os.environ | place.variables, pass_fds=[file],
                stdin=subprocess.PIPE, stdout=2,
            )  # fmt: skip
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, masked)
            sender.close()

    def messages(self) -> Generator[Message, None, None]:
        """What the process has sent since."""
        try:
            while self.receiver.poll():
                yield self.receiver.recv()
        except (EOFError, OSError):  # the last message of a killed process may be half of one
            self.ended = True

    def end(self) -> int:
        """Exit code of a process that has ended; negative for a signal."""
        code = self.process.wait()
        self.receiver.close()
        if self.process.stdin:
            self.process.stdin.close()
        return code


class WorkerPool:
    """Worker processes of one batch."""

    def __init__(
        self, ledger: Ledger, places: Sequence[WorkerPlace], options: Mapping[str, Any], *,
        on_message: OnMessage,
    ) -> None:  # fmt: skip
        """`options` are the keyword arguments of each process's BatchWorker, as JSON allows."""
        self._ledger, self._places, self._on_message = ledger, places, on_message
        self._arguments = (str(ledger.path.absolute()), json.dumps(options))
        self._processes: dict[int, _WorkerProcess] = {}  # by the number of their places
        self._stopping = False
        self._deaths = 0  # since a job was made

    def run(self) -> Generator[JobOutcome, None, None]:
        """Yield jobs as they end, until none is left. What runs at a close is given back."""
        with tidied(self._kill):
            try:
                while self._start_missing():
                    receivers: list[Connection] = [
                        process.receiver for process in self._processes.values()
                    ]
                    wait(receivers, timeout=_LOOK_S)
                    for process in list(self._processes.values()):
                        yield from self._poll(process)
            finally:
                self._end_all()

    def stop(self) -> None:
        """Let the workers give back what runs; `run` yields what has ended until then."""
        self._stopping = True
        for process in self._processes.values():
            process.process.terminate()

    def _start_missing(self) -> bool:
        """Start workers for the jobs that nobody will take; returns whether any worker is left."""
        if not self._stopping:
            counts = self._ledger.counts()
            idle = sum(process.job is None for process in self._processes.values())
            missing = max(0, counts["pending"] - idle)
            if not self._processes and counts["running"]:
                missing = max(1, missing)  # waits for others, who may be dead
            free = [n for n in range(len(self._places)) if n not in self._processes]
            for number in free[:missing]:
                place = self._places[number]
                self._processes[number] = _WorkerProcess(number, place, self._arguments)
        return bool(self._processes)

    def _poll(self, process: _WorkerProcess) -> Generator[JobOutcome, None, None]:
        """Yield the outcomes that a worker sends, and what becomes of its job if it has died."""
        for message in process.messages():
            if isinstance(message, WorkerFailed):
                raise message.error
            number = process.number
            if isinstance(message, ActorMessage):
                number, message = message.number, message.message
            process.job = message.job if isinstance(message, JobStarted) else process.job
            self._on_message(number, message)
            if isinstance(message, JobOutcome):
                process.job, self._deaths = None, 0
                yield message
        if process.ended:
            yield from self._on_death(process)

    def _on_death(self, process: _WorkerProcess) -> Generator[JobOutcome, None, None]:
        """Yield the outcomes that a process which has ended could not send."""
        code = process.end()
        del self._processes[process.number]
        if process.job and (outcome := _outcome_in(self._ledger, process.job)):
            self._on_message(process.number, outcome)
            yield outcome
        for job in self._ledger.free_abandoned():
            yield JobOutcome(job, error=died_error())
        if code and not self._stopping:
            self._count_death(process, code)

    def _count_death(self, process: _WorkerProcess, code: int) -> None:
        """Warn of a death. Raises RunError if workers die without making anything."""
        self._deaths += 1
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended ({code})"
        where = f" in {process.job.output.name}" if process.job else ""
        memory = " (out of memory?)" if code == -signal.SIGKILL else ""
        text = f"{process.place.name} {how}{memory}{where}; another takes its place."
        self._on_message(process.number, WorkerWarning(text, "dmesg says whether memory ran out"))
        if self._deaths > MOST_DEATHS * (len(self._places) + 1):
            raise RunError(
                f"{self._deaths} workers have died without making a video.",
                hint="fewer `workers`, or less memory: `offload group`",
            )

    def _end_all(self) -> None:
        """End all workers; those that take too long are killed."""
        self.stop()
        until = monotonic() + GRACE_S
        for process in self._processes.values():
            try:
                process.process.wait(max(0.0, until - monotonic()))
            except subprocess.TimeoutExpired:
                process.process.kill()
            process.end()
        self._processes.clear()

    def _kill(self) -> None:
        """Kill all workers; their jobs wait again."""
        for process in self._processes.values():
            process.process.kill()


def _outcome_in(ledger: Ledger, job: ClaimedJob) -> JobOutcome | None:
    """What became of a job whose worker was killed; None if it has not ended."""
    row = ledger.row(job.number)
    if row["attempt"] != job.attempt:
        return None
    if row["state"] == FAILED:
        error = json.loads(row["error"])
        return JobOutcome(job, error=RunError(error["message"], hint=error["hint"]))
    if row["state"] in (DONE, SKIPPED):
        return JobOutcome(job, record=json.loads(row["record"]), kept=row["state"] == SKIPPED)
    return None
