"""Command lines in forks of this process, which has imported all that they will."""

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import os
import pkgutil
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

from wancli import interrupts

HANGS_S = 20.0
LET_S = 60.0  # what a wait that is no case may take
MEMORY = 4 * 2**30  # bytes more than this process has; a request is refused or fits
_OVER_MODES = (1, 2)  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
_CAPBSET_DROP, _CAPABILITY_VERSION = 24, 0x20080522

# Where a stream of a command goes.
File, Closed, Full, Broken, Null = "file", "closed", "full", "broken", "null"


_OLD: list[Any] = []


@dataclass(frozen=True)
class Command:
    """`wancli ARGUMENTS` in a folder."""

    arguments: tuple[str, ...]
    folder: Path
    variables: Mapping[str, str]
    said: Path  # folder that takes stdout and stderr
    streams: tuple[str, str, str] = (Null, File, File)
    encoding: str = "utf-8"
    stdin: bytes = b""
    plain: bool = False  # as a user who may not read everything
    file_limit: int | None = None  # bytes


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


def entry() -> Callable[[], Any]:
    """What the installed `wancli` calls."""
    (found,) = entry_points(group="console_scripts", name="wancli")
    main: Callable[[], Any] = found.load()
    return main


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
    vars(interrupts._state).clear()
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
        _prepare(command)
        os.close(begun)
        _be()
    except BaseException:  # noqa: BLE001 - of the harness, which must not go on as its own child
        with contextlib.suppress(OSError):
            (command.said / "err").write_text(f"harness: {traceback.format_exc()}")
    os._exit(99)


def run(command: Command, *, hangs_s: float = HANGS_S) -> Ended:
    """Run it to its end."""
    return start(command).wait(hangs_s=hangs_s)


def _prepare(command: Command) -> None:
    """What a shell and Python's start do for a process."""
    os.setpgid(0, 0)
    (command.said / "in").write_bytes(command.stdin)
    for number, (kind, name) in enumerate(zip(command.streams, ("in", "out", "err"), strict=True)):
        _stream(number, kind, command.said / name)
    for caught in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(caught, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(command.variables)
    sys.argv = ["wancli", *command.arguments]
    _limit(command)
    if command.plain:
        _drop_rights()
    with contextlib.suppress(PermissionError):
        os.chdir(command.folder)
    tempfile.tempdir = None
    atexit._clear()  # what this process registered is not the command's
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    _open_streams(command.encoding)
    if command.streams[2] == File:
        faulthandler.enable(2)  # says where it hangs


def _stream(number: int, kind: str, path: Path) -> None:
    if kind == Broken:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, number)
        return
    flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
    place = {Full: "/dev/full", Null: os.devnull}.get(kind, path)
    opened = os.open(place, flags)
    os.dup2(opened, number)
    os.close(opened)
    if kind == Closed:
        os.close(number)


def _drop_rights() -> None:
    """Let the modes of files count, of root's as well, here and in what is started from here."""
    if os.geteuid():
        return
    system = ctypes.CDLL(None)
    for right in _OVER_MODES:
        system.prctl(_CAPBSET_DROP, right, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    rights = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    system.capget(header, rights)
    for index in (0, 1):
        for right in _OVER_MODES:
            rights[index] &= ~(1 << right)
    if system.capset(header, rights):
        raise OSError("capset")


def _limit(command: Command) -> None:
    with Path("/proc/self/statm").open() as file:
        mine = int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mine + MEMORY, mine + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if command.file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (command.file_limit, command.file_limit))


def _open_streams(encoding: str) -> None:
    """sys.stdin, stdout and stderr, as Python opens them: None where there is none."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream: Any = None
        with contextlib.suppress(OSError):
            os.fstat(number)
            mode = "r" if number == 0 else "w"
            errors = "backslashreplace" if number == 2 else "strict"
            if encoding == "locale":  # of C: what is not UTF-8 passes through
                encoding, errors = "utf-8", errors if number == 2 else "surrogateescape"
            stream = open(  # noqa: SIM115 - a number, which stays open
                number, mode, encoding=encoding, errors=errors, closefd=False,
                buffering=1 if number == 2 else -1,
            )  # fmt: skip
        _OLD.append(getattr(sys, name))  # which may close the number as it goes
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _be() -> NoReturn:
    """Call what `wancli` calls, and end as Python ends."""
    code: Any = 0
    try:
        entry()()
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException as error:  # noqa: BLE001 - a process would end with it too
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        if sys.stderr:
            with contextlib.suppress(OSError, ValueError):
                traceback.print_exc()
    if not isinstance(code, int):
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream:
                stream.flush()
        except (OSError, ValueError, AttributeError):
            code = 120  # as Python itself
    os._exit(code & 0xFF)


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""
