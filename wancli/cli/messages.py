"""Lines of text that need no terminal library: results, and errors with flags in them."""

import os
import sys
from difflib import SequenceMatcher
from typing import Any

from wancli.cli.streams import printable
from wancli.errors import SETTING, WancliError
from wancli.utils.interrupts import Interrupted

LONGEST = 2000  # characters of an error or a hint
_AS_CLOSE = 0.15  # difference of difflib's ratios


def dashed(name: str) -> str:
    """Name of an option with dashes: `num_frames` is `num-frames`."""
    return name.replace("_", "-")


def flag(name: str) -> str:
    """Flag of a setting: `flow_shift` is `--flow-shift`."""
    return f"--{dashed(name)}"


def similar_flags(error: Any) -> str:
    """Flags that Typer's error about an unknown one may mean, the closest first; "" for none.

    Only those that are about as close as the closest: of `--step` it is `--steps` alone.
    """
    known = {
        name: SequenceMatcher(None, error.option_name.lstrip("-"), name.lstrip("-")).ratio()
        for name in getattr(error, "possibilities", None) or ()
    }
    near = [name for name, ratio in known.items() if ratio > max(known.values()) - _AS_CLOSE]
    return ", ".join(sorted(near, key=known.__getitem__, reverse=True))


def with_flags(text: str) -> str:
    """A message with the settings that it names in backticks as flags: `cfg_gate 0.6`."""
    return SETTING.sub(lambda match: flag(match[1]) + match[2], text)


def write_error(error: WancliError | Interrupted, *, color: bool) -> None:
    """Write an error and its hint on stderr, a line each."""
    red, bold, off = ("\x1b[1;31m", "\x1b[1m", "\x1b[0m") if color else ("", "", "")
    sys.stderr.write(
        f"{red}error:{off} {_one_line(str(error))}\n{bold}hint:{off}  {_one_line(error.hint)}\n"
    )
    sys.stderr.flush()


def write_result(text: str, *, bold: bool = False) -> None:
    """Write a line on stdout."""
    line = f"\x1b[1m{printable(text)}\x1b[0m" if bold else printable(text)
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def use_color(number: int) -> bool:
    """Whether a standard stream gets colors: a terminal, unless the environment decides."""
    if os.environ.get("NO_COLOR"):
        return False
    capable = os.environ.get("TERM") not in ("dumb", "unknown")
    return bool(os.environ.get("FORCE_COLOR")) or (capable and os.isatty(number))


def _one_line(text: str) -> str:
    """Text on one line, without the middle of a very long one."""
    line = printable(" ".join(with_flags(text).split()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} … {line[-LONGEST // 2 :]}"
