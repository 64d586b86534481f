r"""Standard streams that are always open and accept every character.

A closed stream (`>&-`) becomes /dev/null. Characters that the encoding lacks are escaped as in
JSON, `\u2026`, and so are control characters, which texts of others could send to a terminal.
"""

import codecs
import io
import os
import re
import select
import signal
import sys
from typing import Any

from wancli.errors import OutputError
from wancli.utils.interrupts import Interrupted, uninterrupted

_ESCAPED = "wancli.escaped"  # name of an error handler

# C0 and C1 but tab and newline, line separators, and what turns the direction of text around.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""Text with control characters escaped: `\u001b` for ESC. JSON keeps its meaning."""
    return _CONTROLS.sub(lambda match: _escaped(match[0]), text)


def open_streams() -> None:
    """Replace Python's standard streams."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number is this one
    for side in ("COLUMNS", "LINES"):
        if not os.environ.get(side, "1").strip("0"):  # no text fits in 0 columns
            del os.environ[side]
    codecs.register_error(_ESCAPED, _escape)
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = _text(_Stdout(1, "w", closefd=False), sys.stdout)
    sys.stderr = _text(_Stderr(2, "w", closefd=False), sys.stderr)


def flush_streams() -> None:
    """Write what is buffered."""
    sys.stdout.flush()
    sys.stderr.flush()


class _Stdout(io.FileIO):
    """Standard output; a failed write is an error, once."""

    _broken = False

    def write(self, data: Any) -> int:
        """Write some of `data`. Raises OutputError, and Interrupted where the reader has gone."""
        if self._broken:
            return len(data)
        try:
            return _write(super(), data)
        except BrokenPipeError:
            self._broken = True
            raise Interrupted(signal.SIGPIPE) from None
        except OSError as error:
            self._broken = True
            raise OutputError(
                f"cannot write to standard output: {error.strerror}.",
                hint="redirect it elsewhere",
            ) from None


class _Stderr(io.FileIO):
    """Standard error; a failed write is ignored."""

    _broken = False

    def write(self, data: Any) -> int:
        """Write some of `data`, or drop it."""
        if not self._broken:
            try:
                return _write(super(), data)
            except OSError:
                self._broken = True
        return len(data)


def _write(file: Any, data: Any) -> int:
    """Write some of `data`, waiting for room.

    A signal ends the wait, but not the write: what an interrupted write had written, the buffer
    would write again. With room, so many bytes go into a pipe without waiting; a file takes all,
    so that records of processes that append to it stay whole.
    """
    data = data if file.seekable() else data[: select.PIPE_BUF]
    while True:
        select.select([], [file.fileno()], [])
        with uninterrupted():
            if (count := file.write(data)) is not None:
                return int(count)


def _text(file: io.FileIO, old: Any) -> io.TextIOWrapper:
    encoding = old.encoding if old else "utf-8"
    buffer = io.BufferedWriter(file)
    return io.TextIOWrapper(buffer, encoding, _ESCAPED, line_buffering=True)


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return _escaped(error.object[error.start : error.end]), error.end


def _escaped(text: str) -> str:
    """As JSON writes it: two bytes at a time."""
    pairs = text.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{pairs[start : start + 4]}" for start in range(0, len(pairs), 4))
