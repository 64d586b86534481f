"""Command lines in forks of this process, which has imported all that they will."""

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

from tests.fuzz.child import Command, be, entry, prepare
from wancli.utils import interrupts

HANGS_S = 20.0
LET_S = 60.0  # what a wait that is no case may take


@dataclass(frozen=True)
class Ended:
    """What became of it. A negative code is the signal that killed it."""

    code: int
    out: bytes
    err: bytes
    seconds: float
    hung: bool = False
    left: bool = False  # processes that it started and did not wait for


def warm() -> None:
    """Import all of wancli and what it imports; one thread, so that forks are safe."""
    import torch

    import wancli

    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(wancli.__path__, "wancli."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def warm_lightly() -> None:
    """Import what commands that only tell import: no torch."""
    for folder in ("wancli", "wancli.cli"):
        for module in pkgutil.iter_modules(importlib.import_module(folder).__path__, f"{folder}."):
            if not module.ispkg and not module.name.endswith("__main__"):
                importlib.import_module(module.name)


def settle() -> None:
    """Leave what is here out of garbage collection: forks then share it."""
    gc.collect()
    gc.freeze()


def here(*arguments: object, folder: Path) -> None:
    """`wancli ARGUMENTS` in this process. Raises RuntimeError where it fails."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGALRM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    argv, sys.argv = sys.argv, ["wancli", *map(str, arguments)]
    streams = sys.stdin, sys.stdout, sys.stderr
    try:
        with contextlib.chdir(folder):
            entry()()
    except SystemExit as ended:
        if ended.code:
            raise RuntimeError(f"wancli {arguments} ended with {ended.code}") from None
    finally:
        sys.argv = argv
        sys.stdin, sys.stdout, sys.stderr = streams
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _anew()


def _anew() -> None:
    """Forget what a run in this process left behind."""
    interrupts._state = interrupts._State()
    sys.unraisablehook = sys.__unraisablehook__


@contextlib.contextmanager
def silently(log: Path) -> Iterator[None]:
    """What anybody says goes to `log`, and is shown only where it goes wrong."""
    kept = [os.dup(number) for number in (1, 2)]
    with log.open("wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    except BaseException:
        os.write(kept[1], log.read_bytes())
        raise
    finally:
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
            os.close(old)


@dataclass
class Child:
    """A command that runs."""

    command: Command
    pid: int
    since: float
    _ended: Ended | None = field(default=None, init=False)

    def send(self, number: int) -> None:
        """A signal, to it alone."""
        if not self._ended:
            os.kill(self.pid, number)

    def wait(self, *, hangs_s: float = HANGS_S) -> Ended:
        """Until it ends, or hangs and is killed."""
        if self._ended is None:
            status, hung = self._reap(hangs_s)
            seconds = time.monotonic() - self.since
            code = os.waitstatus_to_exitcode(status)
            out, err = (_read(self.command.said / name) for name in ("out", "err"))
            self._ended = Ended(code, out, err, seconds, hung, self._left_something())
        return self._ended

    def _reap(self, hangs_s: float) -> tuple[int, bool]:
        while time.monotonic() - self.since < hangs_s:
            if (found := os.waitpid(self.pid, os.WNOHANG))[0]:
                return found[1], False
            time.sleep(0.002)
        os.kill(self.pid, signal.SIGABRT)  # which says where it is
        time.sleep(0.2)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        return os.waitpid(self.pid, 0)[1], True

    def _left_something(self) -> bool:
        """Whether its process group outlives it by a second; what does is killed."""
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
    """Fork, and be the command there; returns as its main function begins."""
    ready, begun = os.pipe()
    command.said.mkdir(parents=True, exist_ok=True)
    since = time.monotonic()
    child = os.fork()
    if child:
        os.close(begun)
        os.read(ready, 1)
        os.close(ready)
        return Child(command, child, since)
    try:
        os.close(ready)
        prepare(command)
        main = entry()
        os.close(begun)
        be(main)
    except BaseException:  # noqa: BLE001 - of the harness, which must not go on as its own child
        with contextlib.suppress(OSError):
            (command.said / "err").write_text(f"harness: {traceback.format_exc()}")
    os._exit(99)


def run(command: Command, *, hangs_s: float = HANGS_S) -> Ended:
    """Run it to its end."""
    return start(command).wait(hangs_s=hangs_s)


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""
