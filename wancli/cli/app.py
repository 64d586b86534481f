"""The app: every command by name, the errors as lines, the exit codes."""

import os
import signal
import sys
import warnings
from types import FrameType
from typing import NoReturn

import typer

from wancli.cli import files, generate, preset
from wancli.cli.options import Talk
from wancli.cli.screen import Screen
from wancli.errors import Interrupted, WancliError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make video with the Wan diffusion models from a shell.",
)
app.command("generate")(generate.generate)
app.command("repro")(generate.repro)
app.command("show")(files.show)
app.command("decode")(files.decode)
app.add_typer(preset.app, name="preset")


def main() -> None:
    """Run the command line; an error of ours is a line, a hint and an exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    sys.argv[1:] = [_dashed(argument) for argument in sys.argv[1:]]
    _hush()
    screen = Screen(Talk(color=False if "--no-color" in sys.argv else None))
    try:
        app()
    except (WancliError, Interrupted) as error:
        if os.environ.get("WANCLI_DEBUG") == "1":
            raise
        screen.error(error)
        sys.exit(error.exit_code)


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


def _hush() -> None:
    """The libraries' advice is for their developers; -v lets it through."""
    if not {"-v", "--verbose"} & set(sys.argv):
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
