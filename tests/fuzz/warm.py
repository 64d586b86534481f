"""Runs command lines in forks of this process, which has already imported everything."""

import contextlib
import gc
import importlib
import os
import pkgutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.forked import renew_threads
from tests.fuzz.child import Command, entry_point, prepare, run_and_exit
from wancli.utils import interrupts

HANG_S = 20.0


@dataclass(frozen=True)
class Outcome:
    """Outcome of a command. A negative code is the signal that killed it."""

    code: int
    out: bytes
    err: bytes
    seconds: float
    hung: bool = False
    left_processes: bool = False  # child processes that outlived it


def warm() -> None:
    """Import all of wancli; use a single thread, so that forks are safe."""
    import torch

    import wancli

    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(wancli.__path__, "wancli."):
        if not module.name.endswith(("__main__", "ray_driver")):  # Ray is an extra
            importlib.import_module(module.name)


def warm_lightly() -> None:
    """Import what commands that only print import: no torch."""
    for folder in ("wancli", "wancli.cli"):
        for module in pkgutil.iter_modules(importlib.import_module(folder).__path__, f"{folder}."):
            if not module.ispkg and not module.name.endswith("__main__"):
                importlib.import_module(module.name)


def freeze_objects() -> None:
    """Exclude existing objects from garbage collection, so that forks share them."""
    gc.collect()
    gc.freeze()


def run_here(*arguments: object, folder: Path) -> None:
    """Run `wancli ARGUMENTS` in this process. Raises RuntimeError if it fails."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGALRM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    argv, sys.argv = sys.argv, ["wancli", *map(str, arguments)]
    streams = sys.stdin, sys.stdout, sys.stderr
    try:
        with contextlib.chdir(folder):
            entry_point()()
    except SystemExit as exit_:
        if exit_.code:
            raise RuntimeError(f"wancli {arguments} exited with {exit_.code}") from None
    finally:
        sys.argv = argv
        sys.stdin, sys.stdout, sys.stderr = streams
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _reset()


def _reset() -> None:
    """Reset what a run in this process left behind."""
    interrupts._state = interrupts._State()
    sys.unraisablehook = sys.__unraisablehook__


@contextlib.contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Redirect all output to `log`, and show it only after an error."""
    saved = [os.dup(number) for number in (1, 2)]
    with log.open("wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    except BaseException:
        os.write(saved[1], log.read_bytes())
        raise
    finally:
        for number, old in zip((1, 2), saved, strict=True):
            os.dup2(old, number)
            os.close(old)


@dataclass
class Child:
    """A running command."""

    command: Command
    pid: int
    since: float
    _outcome: Outcome | None = field(default=None, init=False)

    def send(self, number: int) -> None:
        """Send a signal to this process only."""
        if not self._outcome:
            os.kill(self.pid, number)

    def wait(self, *, hang_s: float = HANG_S) -> Outcome:
        """Wait until it ends, or kill it if it hangs."""
        if self._outcome is None:
            status, hung = self._reap(hang_s)
            seconds = time.monotonic() - self.since
            code = os.waitstatus_to_exitcode(status)
            out, err = (_read(self.command.output / name) for name in ("out", "err"))
            self._outcome = Outcome(code, out, err, seconds, hung, self._has_left_processes())
        return self._outcome

    def _reap(self, hang_s: float) -> tuple[int, bool]:
        while time.monotonic() - self.since < hang_s:
            if (status := os.waitpid(self.pid, os.WNOHANG))[0]:
                return status[1], False
            time.sleep(0.002)
        os.kill(self.pid, signal.SIGABRT)  # prints where it hangs
        time.sleep(0.2)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        return os.waitpid(self.pid, 0)[1], True

    def _has_left_processes(self) -> bool:
        """Whether its process group outlives it by a second; survivors are killed."""
        for _ in range(50):
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return False
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        return True


def start(command: Command) -> Child:
    """Fork and run the command there; returns when its main function starts."""
    ready, started = os.pipe()
    command.output.mkdir(parents=True, exist_ok=True)
    since = time.monotonic()
    child = os.fork()
    if child:
        os.close(started)
        os.read(ready, 1)
        os.close(ready)
        return Child(command, child, since)
    try:
        os.close(ready)
        renew_threads()
        prepare(command)
        main = entry_point()
        os.close(started)
        run_and_exit(main)
    except BaseException:  # noqa: BLE001 - the harness must not continue as its own child
        with contextlib.suppress(OSError):
            (command.output / "err").write_text(f"harness: {traceback.format_exc()}")
    os._exit(99)


def run(command: Command, *, hang_s: float = HANG_S) -> Outcome:
    """Run a command to its end."""
    return start(command).wait(hang_s=hang_s)


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""
