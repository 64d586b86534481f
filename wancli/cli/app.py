"""The app: every command by name, the errors as lines, the exit codes."""

import errno
import logging
import os
import signal
import sys
import warnings
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.exceptions import TyperException

from wancli.cli.lazy import Entry, dashed, lazy
from wancli.errors import CapacityError, OutputError, SetupError, UsageError, WancliError
from wancli.utils.interrupts import Interrupted, ignore
from wancli.utils.threads import choose_threads

COMMANDS = {
    "generate": Entry("wancli.cli.generate:generate", "Generate a video from a prompt."),
    "rollout": Entry(
        "wancli.cli.rollout:rollout",
        "Generate a video chunk by chunk, of any length, at constant memory.",
    ),
    "plan": Entry(
        "wancli.cli.plan:plan", "Estimate what a video needs, and whether it fits; loads nothing."
    ),
    "repro": Entry(
        "wancli.cli.repro:repro", "Make a video again from its own record; any flag overrides it."
    ),
    "show": Entry(
        "wancli.cli.show:show", "Print the record inside a video: the recipe that made it."
    ),
    "decode": Entry("wancli.cli.show:decode", "Turn saved latents into a video."),
    "compare": Entry(
        "wancli.cli.compare:compare", "Measure how far a video, or latents, are from another."
    ),
    "preview": Entry(
        "wancli.cli.preview:preview", "Make a contact sheet of videos, a GIF or an animated WebP."
    ),
    "bench": Entry(
        "wancli.cli.bench:bench",
        "Say what a cache costs in quality and wins in time.",
    ),
    "doctor": Entry("wancli.cli.doctor:doctor", "Say what this machine can run, and why not."),
    "preset": Entry("wancli.cli.preset:app", "Named settings: list, show, check and save them."),
    "model": Entry(
        "wancli.cli.model:app",
        "Models: list, download, inspect, delete, and make one from a checkpoint.",
    ),
}

# What a full, broken or read-only disk says.
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)

app = typer.Typer(
    cls=lazy(COMMANDS),
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": dashed,
    },
)


@app.callback()
def _wancli() -> None:
    """Make video with the Wan diffusion models from a shell."""


def main() -> None:
    """Run the command line; an error of ours is a line, a hint and an exit code."""
    choose_threads()
    flags = set(takewhile(lambda argument: argument != "--", sys.argv[1:]))
    if not {"-v", "--verbose"} & flags:
        _silence_libraries()
    if {"--no-color", "--no_color"} & flags or os.environ.get("NO_COLOR"):
        _disable_color()
    try:
        _check_place()
        code = app(prog_name="wancli", standalone_mode=False) or 0
        ignore()
        sys.exit(code)
    except TyperException as error:
        _end(_usage_error(error))
    except (WancliError, Interrupted) as error:
        _end(error)
    except Exception as error:  # noqa: BLE001 - the last line of defence says what happened
        known = _unexpected(error)
        known.__cause__ = error
        _end(known)


def _check_place() -> None:
    """Raise UsageError for names that are not text, SetupError for a folder that is gone."""
    named = (text for name, text in os.environ.items() if name.startswith("WANCLI_"))
    for text in (*sys.argv[1:], *named):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"{text!r} is not UTF-8 text.", hint="rename the file; or LC_ALL=C.UTF-8"
            ) from None
    try:
        Path.cwd()
    except OSError as error:
        raise SetupError(
            f"cannot work in this folder: {error.strerror}.", hint="cd to one that is there"
        ) from None


def _end(error: WancliError | Interrupted) -> NoReturn:
    ignore()
    if isinstance(error, Interrupted) and error.number == signal.SIGPIPE:
        sys.exit(error.exit_code)  # whoever read, as `head` does, has enough
    if os.environ.get("WANCLI_DEBUG") == "1":
        raise error
    from wancli.cli.options import OutputOptions
    from wancli.cli.screen import Screen

    Screen(OutputOptions()).error(error)
    sys.exit(error.exit_code)


def _usage_error(error: Any) -> UsageError:
    """Typer's usage error as an error and a hint."""
    possibilities = getattr(error, "possibilities", None)  # of an unknown option
    if possibilities:
        return UsageError(error.message, hint=", ".join(sorted(possibilities)))
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "wancli"
    return UsageError(error.format_message(), hint=f"{command} --help")


def _unexpected(error: Exception) -> WancliError:
    """The last line of defence; what the system refuses is no fault of ours."""
    if isinstance(error, MemoryError):
        return CapacityError("out of memory.", hint="a smaller request")
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        place = f"{os.fsdecode(error.filename)}: {error.strerror}."
        if error.errno in _STORAGE:
            return OutputError(f"cannot write {place}", hint="free some space, or another place")
        return SetupError(f"cannot use {place}", hint="check the path, and what it permits")
    message = f"unexpected {type(error).__name__}: {error}"
    return WancliError(message, hint="WANCLI_DEBUG=1 shows where; please report it")


def _silence_libraries() -> None:
    """Hide warnings that are meant for the developers of the libraries."""
    for name in ("torchao", "torch.utils._pytree"):  # which diffusers imports where it finds it
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def _disable_color() -> None:
    """Print Typer's help, which ignores --no-color, without color too."""
    os.environ["NO_COLOR"] = "1"
    for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):
        os.environ.pop(name, None)
