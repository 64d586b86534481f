"""The app: every command by name, the errors as lines, the exit codes."""

import errno
import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.exceptions import TyperException

from wancli.cli.lazy import Entry, lazy
from wancli.errors import CapacityError, OutputError, SetupError, UsageError, WancliError
from wancli.utils.interrupts import Interrupted, ignore
from wancli.utils.threads import choose_threads

COMMANDS = {
    "generate": Entry("wancli.cli.generate:generate", "Make a video of a prompt."),
    "rollout": Entry(
        "wancli.cli.rollout:rollout",
        "Make a video chunk after chunk, as long as you like, at constant memory.",
    ),
    "plan": Entry(
        "wancli.cli.plan:plan", "Say what a video would take, and whether it fits; load nothing."
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
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _wancli() -> None:
    """Make video with the Wan diffusion models from a shell."""


def main() -> None:
    """Run the command line; an error of ours is a line, a hint and an exit code."""
    choose_threads()
    sys.argv[1:] = _joined([_dashed(argument) for argument in sys.argv[1:]])
    _hush()
    if "--no-color" in sys.argv or os.environ.get("NO_COLOR"):
        _fade()
    try:
        _check_place()
        code = app(prog_name="wancli", standalone_mode=False) or 0
        ignore()
        sys.exit(code)
    except TyperException as error:
        _end(_in_our_words(error))
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


def _in_our_words(error: Any) -> UsageError:
    """Typer's usage errors, as an error and a hint. No arguments at all: the help."""
    context = error.ctx
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        sys.exit(2)
    message, _, options = error.format_message().partition(" (Possible options: ")
    message, _, meant = message.partition(" Did you mean ")
    hint = options.rstrip(")") or meant.rstrip("?")
    command = context.command_path if context else "wancli"
    return UsageError(message, hint=hint or f"{command} --help")


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


def _dashed(argument: str) -> str:
    """`--num_frames=33` is `--num-frames=33`."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _joined(arguments: list[str]) -> list[str]:
    """`--at 5 "a prompt"` is `--at "5 a prompt"`: Typer has no repeatable pairs."""
    out: list[str] = []
    for argument in arguments:
        if len(out) > 1 and out[-2] == "--at" and out[-1].isdigit():
            out[-1] += f" {argument}"
        else:
            out.append(argument)
    return out


def _hush() -> None:
    """The libraries' advice is for their developers; -v lets it through."""
    if not {"-v", "--verbose"} & set(sys.argv):
        for name in ("torchao", "torch.utils._pytree"):  # which diffusers imports where it finds it
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def _fade() -> None:
    """Have Typer's help, which knows no --no-color, be as plain as the rest."""
    os.environ["NO_COLOR"] = "1"
    for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):
        os.environ.pop(name, None)
