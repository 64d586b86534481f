"""Turns a fork into `wancli ARGUMENTS`: streams, rights, limits, and Python's exit."""

import atexit
import contextlib
import ctypes
import faulthandler
import os
import resource
import signal
import sys
import tempfile
import threading
import traceback
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn

MEMORY = 4 * 2**30  # bytes beyond this process's own; a request fits or is rejected
_OVER_MODES = (1, 2)  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
_CAPBSET_DROP, _CAPABILITY_VERSION = 24, 0x20080522
_OLD: list[Any] = []
# Targets of a command's streams.
File, Closed, Full, Broken, Null = "file", "closed", "full", "broken", "null"


@dataclass(frozen=True)
class Command:
    """`wancli ARGUMENTS` in a folder, with its environment and streams."""

    arguments: tuple[str, ...]
    folder: Path
    variables: Mapping[str, str]
    output: Path  # folder for stdout and stderr
    streams: tuple[str, str, str] = (Null, File, File)
    encoding: str = "utf-8"
    stdin: bytes = b""
    unprivileged: bool = False  # file permissions apply, even to root
    file_limit: int | None = None  # bytes


def entry_point() -> Callable[[], Any]:
    """The function that the installed `wancli` script calls."""
    (script,) = entry_points(group="console_scripts", name="wancli")
    main: Callable[[], Any] = script.load()
    return main


def prepare(command: Command) -> None:
    """Set up the process as a shell and Python's startup do."""
    os.setpgid(0, 0)
    (command.output / "in").write_bytes(command.stdin)
    for number, (kind, name) in enumerate(zip(command.streams, ("in", "out", "err"), strict=True)):
        _stream(number, kind, command.output / name)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(command.variables)
    sys.argv = ["wancli", *command.arguments]
    _limit(command)
    if command.unprivileged:
        _drop_rights()
    with contextlib.suppress(PermissionError):
        os.chdir(command.folder)
    tempfile.tempdir = None
    atexit._clear()  # registered by the parent, not by the command
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    _open_streams(command.encoding)
    if command.streams[2] == File:
        faulthandler.enable(2)  # shows where it hangs


def _stream(number: int, kind: str, path: Path) -> None:
    if kind == Broken:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, number)
        return
    flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
    target = {Full: "/dev/full", Null: os.devnull}.get(kind, path)
    fd = os.open(target, flags)
    os.dup2(fd, number)
    os.close(fd)
    if kind == Closed:
        os.close(number)


def _drop_rights() -> None:
    """Make file permissions apply even to root, here and in child processes."""
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
        used = int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if command.file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (command.file_limit, command.file_limit))


def _open_streams(encoding: str) -> None:
    """Open sys.stdin, stdout and stderr as Python does; None for a closed one."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream: Any = None
        with contextlib.suppress(OSError):
            os.fstat(number)
            mode = "r" if number == 0 else "w"
            errors = "backslashreplace" if number == 2 else "strict"
            if encoding == "locale":  # the C locale: undecodable bytes pass through
                encoding, errors = "utf-8", errors if number == 2 else "surrogateescape"
            stream = open(  # noqa: SIM115 - the descriptor stays open
                number, mode, encoding=encoding, errors=errors, closefd=False,
                buffering=1 if number == 2 else -1,
            )  # fmt: skip
        _OLD.append(getattr(sys, name))  # kept alive: it may close the descriptor
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def run_and_exit(main: Callable[[], Any]) -> NoReturn:
    """Call `main` and exit as Python does."""
    code: Any = 0
    try:
        main()
    except SystemExit as exit_:
        code = exit_.code or 0
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
            code = 120  # as Python does
    os._exit(code & 0xFF)
