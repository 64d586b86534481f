"""The command line: commands by name, errors as two lines, exit codes."""

import os
import signal
import sys
import warnings
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.exceptions import TyperException

from wancli.cli import help_text
from wancli.cli.lazy import Entry, lazy
from wancli.cli.messages import dashed, similar_flags, use_color, write_error, write_result
from wancli.errors import SetupError, UsageError, WancliError, must_be, unexpected
from wancli.utils.interrupts import Interrupted, ignore, received
from wancli.utils.packages import silence_torchao
from wancli.utils.threads import choose_threads

COMMANDS = {
    "generate": Entry("wancli.cli.generate:generate", "Generate a video from a prompt."),
    "rollout": Entry(
        "wancli.cli.rollout:rollout",
        "Generate a video of any length, chunk by chunk, in constant memory.",
    ),
    "batch": Entry("wancli.cli.batch:app", "Make the videos of a file of jobs, or prompts."),
    "plan": Entry(
        "wancli.cli.plan:plan", "Estimate what a video needs, and whether it fits; loads nothing."
    ),
    "repro": Entry(
        "wancli.cli.repro:repro", "Reproduce a video from its own record; any flag overrides it."
    ),
    "show": Entry("wancli.cli.show:show", "Print the record inside a video: how it was generated."),
    "decode": Entry("wancli.cli.show:decode", "Decode saved latents into a video."),
    "compare": Entry(
        "wancli.cli.compare:compare",
        "Compare two videos, or two latents: SSIM, PSNR, temporal difference.",
    ),
    "preview": Entry(
        "wancli.cli.preview:preview",
        "Make contact sheets, GIFs and WebPs of videos, or a labelled sheet of a sweep.",
    ),
    "bench": Entry(
        "wancli.cli.bench:bench",
        "Measure the speed and quality of caches against a baseline.",
    ),
    "doctor": Entry(
        "wancli.cli.doctor:doctor", "Check what this machine can run, and how to fix the rest."
    ),
    "preset": Entry("wancli.cli.preset:app", "Named settings: list, show, check and save them."),
    "model": Entry(
        "wancli.cli.model:app",
        "Models: list, download, inspect, delete, and convert checkpoints.",
    ),
}

LIBRARIES = ("torch", "diffusers", "transformers", "cache-dit", "torchao")  # of --version -v

app = typer.Typer(
    cls=lazy(COMMANDS),
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": list(help_text.NAMES),
        "token_normalize_func": dashed,
    },
)


Version = Annotated[
    bool,
    typer.Option("--version", "-V", help="Print the version; with -v, of the libraries too."),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", hidden=True)]


@app.callback(invoke_without_command=True)
def _wancli(context: typer.Context, *, version: Version = False, verbose: Verbose = False) -> None:
    """Generate video with the Wan diffusion models from a shell."""
    if version:
        _write_versions(["wancli", *(LIBRARIES if verbose else ())])
        raise typer.Exit
    if context.invoked_subcommand is None:
        raise UsageError("Missing command.", hint="wancli --help")


def _write_versions(packages: Sequence[str]) -> None:
    """Print the installed versions, a line each; nothing is imported for that."""
    from wancli.utils.packages import package_version

    for name in packages:
        write_result(f"{name} {package_version(name) or 'not installed'}")


def main() -> None:
    """Run the command line and exit; an error prints a line and a hint."""
    choose_threads()
    silence_torchao()
    flags = set(takewhile(lambda argument: argument != "--", sys.argv[1:]))
    if not {"-v", "--verbose"} & flags:
        _silence_libraries()
    if {"--no-color", "--no_color"} & flags or os.environ.get("NO_COLOR"):
        _disable_color()
    try:
        _check_place()
        code = app(prog_name="wancli", standalone_mode=False, color=use_color(1)) or 0
        ignore()
        sys.exit(code)
    except TyperException as error:
        _end(_usage_error(error))
    except (WancliError, Interrupted) as error:
        _end(error)
    except Exception as error:  # noqa: BLE001 - no traceback reaches the user
        _end(unexpected(error))


def _check_place() -> None:
    """Raise UsageError for arguments that are not UTF-8, SetupError where the cwd is gone."""
    variables = (text for name, text in os.environ.items() if name.startswith("WANCLI_"))
    for text in (*sys.argv[1:], *variables):
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
            f"cannot work in this folder: {error.strerror}.", hint="cd to another folder"
        ) from None


def _end(error: WancliError | Interrupted) -> NoReturn:
    ignore()
    if (number := received()) and not isinstance(error, Interrupted):
        error = Interrupted(number)  # of which a library has made another error
    if isinstance(error, Interrupted) and error.number == signal.SIGPIPE:
        sys.exit(error.exit_code)  # the reader, such as `head`, is done
    if os.environ.get("WANCLI_DEBUG") == "1":
        raise error
    write_error(error, color=use_color(2))
    sys.exit(error.exit_code)


def _usage_error(error: Any) -> UsageError:
    """Typer's usage error as an error and a hint."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "wancli"
    option = getattr(error, "option_name", "").lstrip("-").replace("-", "_")
    if hint := (option and _instead(command, option)) or similar_flags(error):
        return UsageError(error.message, hint=hint)  # an unknown option
    return UsageError(must_be(error.format_message()), hint=f"{command} --help")


def _instead(command: str, option: str) -> str:
    from wancli.config.keywords import instead

    if command == "wancli batch run":
        from wancli.batches.jobs import JOB_KEYS

        if option in {"prompt", "seed", "num_videos", *JOB_KEYS["repro"]}:
            return f'a key of the jobs; for all, a first line {{"defaults": {{"{option}": ...}}}}'
    return instead(command.removeprefix("wancli "), option)


def _silence_libraries() -> None:
    """Hide warnings that are meant for the developers of the libraries."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of a batch's workers
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def _disable_color() -> None:
    """Print without color what does not know of --no-color: help, errors, libraries."""
    os.environ["NO_COLOR"] = "1"
    for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"):
        os.environ.pop(name, None)
