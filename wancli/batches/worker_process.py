"""A process that works on a batch for the one that started it (`wancli.batches.workers`)."""

import fcntl
import json
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock, Thread
from time import sleep
from typing import Any, NoReturn

from wancli.batches.worker import BatchWorker, JobOutcome
from wancli.errors import WancliError
from wancli.records.ledger import ClaimedJob, Ledger, open_ledger
from wancli.records.progress import Event
from wancli.utils.heap import keep_heap
from wancli.utils.interrupts import Interrupted, handle, received, unwind_from_here
from wancli.utils.packages import silence_torchao
from wancli.utils.threads import choose_threads

GRACE_S = 30.0  # to give back what runs; ffmpeg may have a file to close


@dataclass(frozen=True)
class JobStarted:
    """A job that a worker begins."""

    job: ClaimedJob


@dataclass(frozen=True)
class WorkerWarning:
    """A warning, of a job or about a worker, and its hint."""

    text: str
    hint: str


@dataclass(frozen=True)
class WorkerFailed:
    """The error that a worker ends with, which is no job's."""

    error: WancliError


@dataclass(frozen=True)
class ActorMessage:
    """A message of one of several actors that a process speaks for."""

    number: int
    message: "Message"


Message = Event | JobStarted | WorkerWarning | JobOutcome | WorkerFailed | ActorMessage


class Send:
    """Sends messages to the process that started this one, from any thread."""

    def __init__(self, file: int) -> None:
        fcntl.fcntl(file, fcntl.F_SETFD, fcntl.FD_CLOEXEC)  # its end is that of this process
        self._connection, self._lock = Connection(file, readable=False), Lock()

    def __call__(self, message: Message) -> None:
        """Send a message; nobody to read it is noticed elsewhere."""
        with self._lock, suppress(BrokenPipeError):
            self._connection.send(message)

    def warn(self, text: str, *, hint: str) -> None:
        """Send a warning."""
        self(WorkerWarning(text, hint))


def main(ledger: str, file: str, options: str) -> NoReturn:
    """Work on a ledger until no job is left; `file` is the number of the pipe to send to."""
    keep_heap()
    serve(ledger, file, lambda opened, send: _work(opened, send, json.loads(options)))


def serve(ledger: str, file: str, work: Callable[[Ledger, Send], None]) -> NoReturn:
    """Do some work on a ledger, and end with this process's parent at the latest."""
    handle()
    unwind_from_here()
    Thread(target=_end_with_parent, daemon=True).start()
    choose_threads()
    silence_torchao()
    send = Send(int(file))
    code = 0
    try:
        with open_ledger(Path(ledger)) as opened:
            work(opened, send)
    except WancliError as error:
        send(WorkerFailed(error))
        code = error.exit_code
    except Interrupted as interrupted:
        code = interrupted.exit_code
    except SystemError:  # of which a library has made it
        if not received():
            raise
        code = Interrupted(received()).exit_code
    os._exit(code)  # taking everything apart takes a while


def _work(ledger: Ledger, send: Send, options: Mapping[str, Any]) -> None:
    worker = BatchWorker(
        ledger, **options, report=send, warn=send.warn, started=lambda job: send(JobStarted(job))
    )
    with closing(worker.run()) as outcomes:
        for outcome in outcomes:
            send(outcome)
            if outcome.error and outcome.error.__cause__:
                return  # an unexpected error, such as a broken CUDA context: start afresh


def _end_with_parent() -> None:
    """Give back what runs as soon as nobody holds the other end of standard input."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    sleep(GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)
