"""Signals that end a run: at once while there is nothing to clean up, later by an exception.

An exception in the middle of an import is swallowed by some libraries and crashes others. So during
the first seconds, which are imports, the process exits directly; later a signal waits until an
import is done. This module imports little, so that signals are handled early.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager, suppress
from time import monotonic

TYPE_CHECKING = False  # importing typing is slow
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType
    from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_AGAIN_S = 0.02
# A signal that comes sooner belongs to the first: make, for one, passes Ctrl-C on as SIGTERM.
_SECOND_S = 1.0


class Interrupted(BaseException):
    """A signal ended the run. As an Exception or KeyboardInterrupt it could be swallowed."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}.")
        self.number = number
        self.exit_code = 128 + number
        self.hint = "no unfinished output is left; run the same command again"


class _State:
    """State of the signal handler."""

    handled = False
    unwinds = False  # whether there is something to clean up
    uninterruptible = 0  # depth of blocks that must run to their end
    number = 0  # of the signal received
    second_ends = False  # whether a second signal does not wait for the cleanup of the first
    since = 0.0  # when the first came, by monotonic

    def __init__(self) -> None:
        self.cleanups: list[Callable[[], object]] = []  # called before a direct exit


_state = _State()


def handle() -> None:
    """Install the handlers. Signals ignored from the start (nohup) stay ignored."""
    signal.signal(signal.SIGALRM, _stop)
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)
    sys.unraisablehook = _unraisable
    _state.handled = True


def unwind_from_here() -> None:
    """From now on raise Interrupted: there are files, a terminal or processes to clean up."""
    _state.unwinds = True


def second_ends_at_once() -> None:
    """From now on a second signal ends the process at once; its cleanup is left to `tidied`."""
    _state.second_ends = True


@contextmanager
def tidied(tidy: Callable[[], object]) -> Iterator[None]:
    """Call `tidy` after the block, even if a signal ends the process within it."""
    _state.cleanups.append(tidy)
    try:
        yield
    finally:
        with uninterrupted():
            tidy()
            _state.cleanups.remove(tidy)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay signals until the end of the block."""
    _state.uninterruptible += 1
    try:
        yield
    finally:
        _state.uninterruptible -= 1


def received() -> int:
    """Number of the signal that ends the run; 0 without one."""
    return _state.number


def ignore() -> None:
    """Ignore signals during the last moments of the process."""
    if _state.handled:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def leave(number: int) -> NoReturn:
    """Print two lines and exit this process at once."""
    error = Interrupted(number)
    for tidy in reversed(_state.cleanups):
        with suppress(Exception):
            tidy()
    with suppress(OSError):
        os.write(2, f"error: {error}\nhint:  {error.hint}\n".encode())
    os._exit(error.exit_code)


def _stop(number: int, frame: FrameType | None) -> None:
    if number != signal.SIGALRM:
        _state.number, _state.since = number, monotonic()
        later = _end_at_once if _state.second_ends else signal.SIG_IGN
        for other in SIGNALS:
            signal.signal(other, later)  # only once, so that cleanup is not interrupted
    if not _state.unwinds:
        leave(_state.number)
    if _state.uninterruptible or _importing(frame):
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
        return
    raise Interrupted(_state.number)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    if monotonic() - _state.since > _SECOND_S:
        leave(_state.number)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _unraisable(unraisable: Any) -> None:
    """Raise again an Interrupted that Python dropped, for example in `__del__`."""
    if isinstance(unraisable.exc_value, Interrupted):
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
    else:
        sys.__unraisablehook__(unraisable)
