"""Every error wancli raises on purpose: one line, one hint that can be typed, one exit code.

Messages and hints name a setting in backticks (`cfg_gate`, `offload model`), which the command line
prints as its flag.

WancliError                     exit 1
├── UsageError                  exit 2    the request is wrong; nothing was loaded
│   ├── SettingsError                     a value a setting cannot take, or a name nobody knows
│   ├── PresetError                       a preset that is missing, or a file that is not one
│   └── PlanError                         settings that are fine alone and wrong together
├── SetupError                  exit 4    a model, file, package or device is missing
│   ├── ModelError                        unknown, not cached, not a model, or with broken weights
│   └── InputError                        a file to read that is missing or not what it should be
├── CapacityError               exit 5    it does not fit in memory
├── RunError                    exit 1    the run itself went wrong (latents that are not finite)
├── OutputError                 exit 6    the video could not be written, or not read back
└── QualityError                exit 7    compare or bench: the threshold is not met

Interrupted (BaseException, of interrupts.py)   exit 130 (SIGINT), 143 (SIGTERM), 129 (SIGHUP)
"""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

_LONGEST_VALUE, _LONGEST_LINE = 80, 400  # characters of what is not ours in an error


class Warn(Protocol):
    """Where a warning goes: a line, and a hint that can be typed."""

    def __call__(self, text: str, *, hint: str) -> None:
        """Say it."""


class WancliError(Exception):
    """Base of the tree. `hint` is what to do next, best something to type."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(WancliError):
    """The request is wrong."""

    exit_code = 2


class SettingsError(UsageError):
    """A value a setting cannot take, or a name nobody knows."""


class PresetError(UsageError):
    """A preset that is missing, or a file that is not one."""


class PlanError(UsageError):
    """Settings that are fine alone and wrong together."""


class SetupError(WancliError):
    """A model, file, package or device is missing."""

    exit_code = 4


class ModelError(SetupError):
    """A model that is unknown, not cached, not a model, or has broken weights."""


class InputError(SetupError):
    """A file to read that is missing or not what it should be."""


class CapacityError(WancliError):
    """It does not fit in memory."""

    exit_code = 5


class RunError(WancliError):
    """The run itself went wrong."""


class OutputError(WancliError):
    """The video could not be written, or not read back."""

    exit_code = 6


class QualityError(WancliError):
    """The threshold of compare or bench is not met."""

    exit_code = 7


def missing(kind: str, path: Path) -> InputError:
    """The error for a file that is not there, with the name beside it that may have been meant."""
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    # One ending is much of a short name, and makes no two of them alike.
    alike = [other.name for other in beside if closest(path.stem, [other.stem])]
    meant = closest(path.name, alike)
    hint = f"did you mean '{path.with_name(meant)}'?" if meant else "check the path"
    return InputError(f"{kind} '{path}' not found.", hint=hint)


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` most likely meant, for hints; None where none is near."""
    spelt = {other.lower(): other for other in known}
    matches = difflib.get_close_matches(name.lower(), spelt, n=1, cutoff=0.6)
    return spelt[matches[0]] if matches else None


def shortened(value: object) -> str:
    """A value as Python writes it, cut where it would fill the screen."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


def first_line(error: BaseException) -> str:
    """First line of a library's message, with quotes for backticks, which mark settings."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line[:_LONGEST_LINE].replace("`", "'")


def no_device(name: str) -> SetupError:
    """The error for a device that is not here."""
    return SetupError(f"--device {name}: this machine has none.", hint="--device auto or cpu")
