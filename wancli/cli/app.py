"""The app: every command by name, the errors as lines, the exit codes."""

import logging
import os
import signal
import sys
import warnings
from types import FrameType
from typing import Any, NoReturn

import typer
from typer.exceptions import TyperException

from wancli.cli.lazy import Entry, lazy
from wancli.errors import Interrupted, UsageError, WancliError

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
        "wancli.cli.files:show", "Print the record inside a video: the recipe that made it."
    ),
    "decode": Entry("wancli.cli.files:decode", "Turn saved latents into a video."),
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
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    sys.argv[1:] = _joined([_dashed(argument) for argument in sys.argv[1:]])
    _hush()
    try:
        sys.exit(app(prog_name="wancli", standalone_mode=False) or 0)
    except TyperException as error:
        _end(_in_our_words(error))
    except (WancliError, Interrupted) as error:
        _end(error)
    except Exception as error:  # noqa: BLE001 - the last line of defence says what happened
        _end(_unexpected(error))


def _end(error: WancliError | Interrupted) -> NoReturn:
    if os.environ.get("WANCLI_DEBUG") == "1":
        raise error
    from wancli.cli.options import Talk
    from wancli.cli.screen import Screen

    Screen(Talk(color=False if "--no-color" in sys.argv else None)).error(error)
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
    message = f"unexpected {type(error).__name__}: {error}"
    wrapped = WancliError(message, hint="WANCLI_DEBUG=1 shows where; please report it")
    wrapped.__cause__ = error
    return wrapped


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)  # clean up once, in peace
    raise Interrupted(number)


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
