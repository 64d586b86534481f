"""Errors that wancli raises: one line, one hint, best something to type, and an exit code.

Messages and hints name a setting in backticks (`cfg_gate`, `offload model`), which the command line
prints as its flag, and the Python functions as a keyword argument.

WancliError                     exit 1
├── UsageError                  exit 2    an invalid request; nothing was loaded
│   ├── SettingsError                     an invalid value, or an unknown setting
│   ├── PresetError                       a missing or invalid preset
│   └── PlanError                         settings that are incompatible
├── BatchError                  exit 3    jobs of a batch failed; the others are done
├── SetupError                  exit 4    a model, file, package or device is missing
│   ├── ModelError                        an unknown, missing or broken model
│   └── InputError                        a missing or invalid input file
├── CapacityError               exit 5    does not fit in memory
├── RunError                    exit 1    the run failed (latents that are not finite)
│   └── DecodeError                       the VAE's video frames are not finite
├── OutputError                 exit 6    the output could not be written or verified
└── QualityError                exit 7    compare or bench: a threshold is not met

Interrupted (BaseException, of interrupts.py)   exit 130 (SIGINT), 143 (SIGTERM), 129 (SIGHUP)
"""

import difflib
import errno
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

SETTING = re.compile(r"`([a-z]\w*)((?: [^`]+)?)`")  # in a message: a setting, perhaps with a value
OVERWRITE_HINT = "`overwrite`, or another `output`"  # of a file that is in the way
_LONGEST_VALUE, _LONGEST_LINE = 80, 400  # characters of foreign text in an error

# Errors of a full, broken or read-only disk.
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


class Warn(Protocol):
    """Callback for a warning and its hint."""

    def __call__(self, text: str, *, hint: str) -> None:
        """Show the warning."""


def warn_once(warn: Warn) -> Warn:
    """A callback that passes each warning on once, where many videos are alike."""
    seen: set[str] = set()

    def new(text: str, *, hint: str) -> None:
        if text not in seen:
            seen.add(text)
            warn(text, hint=hint)

    return new


@dataclass(frozen=True)
class PlanWarning:
    """What is doubtful about a valid request, and a hint."""

    text: str
    hint: str
    of_prompt: bool = False  # about the prompt, and not about settings


class WancliError(Exception):
    """Base of all errors. `hint` is what to do next, best something to type."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self), str(self), self.hint)  # between processes


def _rebuilt(kind: type[WancliError], message: str, hint: str) -> WancliError:
    return kind(message, hint=hint)


class UsageError(WancliError):
    """An invalid request."""

    exit_code = 2


class SettingsError(UsageError):
    """An invalid value, or an unknown setting."""


class PresetError(UsageError):
    """A missing or invalid preset."""


class PlanError(UsageError):
    """Settings that are incompatible."""


class BatchError(WancliError):
    """Jobs of a batch failed; the others are done."""

    exit_code = 3


class SetupError(WancliError):
    """A model, file, package or device is missing or unusable."""

    exit_code = 4


class ModelError(SetupError):
    """An unknown, missing or broken model."""


class InputError(SetupError):
    """A missing or invalid input file."""


class CapacityError(WancliError):
    """The request does not fit in memory."""

    exit_code = 5


class RunError(WancliError):
    """The run failed."""


class DecodeError(RunError):
    """The VAE's video frames are unusable. The hint is settings to decode the same latents with."""


class OutputError(WancliError):
    """The output could not be written or verified."""

    exit_code = 6


class QualityError(WancliError):
    """A threshold of compare or bench is not met."""

    exit_code = 7


def missing(kind: str, path: Path) -> InputError:
    """Error for a missing file, with a similar name in its folder as hint, and for a folder."""
    if path.is_dir():
        return InputError(f"{kind} '{path}' is a folder.", hint="give the file in it")
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    # Compare stems: a shared suffix would make short names look similar.
    similar = [other.name for other in beside if closest(path.stem, [other.stem])]
    near = closest(path.name, [name for name in similar if name != path.name])  # a dead link
    hint = f"did you mean '{path.with_name(near)}'?" if near else "check the path"
    return InputError(f"{kind} '{path}' not found.", hint=hint)


def closest(name: str, known: Iterable[str]) -> str | None:
    """The most similar of the `known` names, for hints; None if none is similar."""
    names = {other.lower(): other for other in known}
    matches = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.6)
    return names[matches[0]] if matches else None


def some(names: Sequence[str], *, most: int = 8, by: str = ", ") -> str:
    """Join the first names of a list, and say how many more there are."""
    more = len(names) - most
    return by.join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def shortened(value: object) -> str:
    """repr of a value, cut to fit on a line."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def first_line(error: BaseException) -> str:
    """First line of a library's message, with quotes for backticks, which mark settings."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line[:_LONGEST_LINE].replace("`", "'")


def must_be(message: str) -> str:
    """pydantic's message about an invalid value, so that it can follow the name of the value."""
    return message.replace("Input should", "must").partition(", unable to parse")[0]


def no_device(name: str) -> SetupError:
    """Error for a device that this machine lacks."""
    return SetupError(
        f"`device {name}` is not available on this machine.", hint="`device auto` or cpu"
    )


def is_disk_full(error: WancliError) -> bool:
    """Whether a file could not be written for lack of space, which ffmpeg says in words, too."""
    words = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]
    return isinstance(error, OutputError) and any(word in str(error) for word in words)


def unexpected(error: Exception) -> WancliError:
    """An error of the system, or of wancli itself, as one with a hint; `__cause__` is the error."""
    wrapped = _wrapped(error)
    wrapped.__cause__ = error
    return wrapped


def is_unexpected(error: WancliError | None) -> bool:
    """Whether an error is of no kind that wancli knows: nobody knows what it has left behind."""
    return type(error) is WancliError


def _wrapped(error: Exception) -> WancliError:
    if isinstance(error, MemoryError):
        return CapacityError("out of memory.", hint="a smaller `size`, or fewer `num_frames`")
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        place = f"{os.fsdecode(error.filename)}: {error.strerror}."
        if error.errno in _STORAGE:
            return OutputError(f"cannot write {place}", hint="free some space, or write elsewhere")
        return SetupError(f"cannot use {place}", hint="check the path and its permissions")
    message = f"unexpected {type(error).__name__}: {error}"
    return WancliError(message, hint="WANCLI_DEBUG=1 prints the traceback; please report it")
