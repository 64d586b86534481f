"""Signals that end a run: at once while it has nothing to tidy up, later by an exception.

An exception in the middle of an import is swallowed by some libraries and aborts others. So the
first seconds, which are imports, end without one; and later a signal waits until an import is done.
Little is imported here, so that signals are answered soon.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager, suppress

TYPE_CHECKING = False  # as in typing, which takes its time
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType
    from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_AGAIN_S = 0.02


class Interrupted(BaseException):
    """Somebody asked us to stop. As an Exception or KeyboardInterrupt it could be swallowed."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}.")
        self.number = number
        self.exit_code = 128 + number
        self.hint = "nothing is left under a final name; run the same command again"


class _State:
    """How the next signal is answered."""

    handled = False
    unwinds = False  # there is something to tidy up
    holds = 0  # blocks that must not be left halfway
    number = 0  # of the signal that came

    def __init__(self) -> None:
        self.tidies: list[Callable[[], object]] = []  # what little there is to do before the end


_state = _State()


def handle() -> None:
    """Answer signals. One that this process was started to ignore (nohup) stays ignored."""
    signal.signal(signal.SIGALRM, _stop)
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _stop)
    sys.unraisablehook = _unraisable
    _state.handled = True


def unwind_from_here() -> None:
    """From now on there is much to tidy up: files, a terminal, other processes."""
    _state.unwinds = True


@contextmanager
def tidied(tidy: Callable[[], object]) -> Iterator[None]:
    """A block after which `tidy` is called, also where the process ends at once in it."""
    _state.tidies.append(tidy)
    try:
        yield
    finally:
        with held():
            tidy()
            _state.tidies.remove(tidy)


@contextmanager
def held() -> Iterator[None]:
    """A block that a signal does not leave halfway: it is answered after it."""
    _state.holds += 1
    try:
        yield
    finally:
        _state.holds -= 1


def ignore() -> None:
    """Be done: what follows takes a moment, and its end is known."""
    if _state.handled:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


def leave(number: int) -> NoReturn:
    """End this process here and now, in two lines and with the exit code."""
    error = Interrupted(number)
    for tidy in reversed(_state.tidies):
        with suppress(Exception):
            tidy()
    with suppress(OSError):
        os.write(2, f"error: {error}\nhint:  {error.hint}\n".encode())
    os._exit(error.exit_code)


def _stop(number: int, frame: FrameType | None) -> None:
    if number != signal.SIGALRM:
        _state.number = number
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)  # once: what is tidied up is left in peace
    if not _state.unwinds:
        leave(_state.number)
    if _state.holds or _importing(frame):
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
        return
    raise Interrupted(_state.number)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _unraisable(unraisable: Any) -> None:
    """An exception that python drops, such as in `__del__`: ours is raised again elsewhere."""
    if isinstance(unraisable.exc_value, Interrupted):
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
    else:
        sys.__unraisablehook__(unraisable)
