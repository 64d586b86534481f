"""Typer's commands and groups as wancli has them: imported when they are called."""

import gc
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException
from typer.main import get_command

from wancli.cli.help_text import help_text
from wancli.errors import UsageError, closest

WORDS = "wancli.words"  # key of what was typed after the command's name, which its help depends on


@contextmanager
def _errors_name(ctx: Any) -> Iterator[None]:
    """Tell Typer's errors which command they are about; its parser leaves that out of some."""
    try:
        yield
    except TyperException as raised:
        error: Any = raised
        error.ctx = getattr(error, "ctx", None) or ctx
        raise


def _has_its_prompt_apart(chunk: str, argument: str) -> bool:
    """Whether the `argument` after `--at chunk` is its prompt, and no flag.

    Of `--at "5 a circle"` it is not; so a prompt that begins with a dash is typed.
    """
    return len(chunk.split()) == 1 and not argument.startswith("-")


def _at_home(value: Any) -> Any:
    """A path with `~` expanded, which shells leave in `--output-dir=~/videos`; else the value."""
    if isinstance(value, list):
        return [*map(_at_home, value)]
    if not isinstance(value, Path):
        return value
    from wancli.utils.reading import user_path

    return user_path(str(value))


class WancliCommand(TyperCommand):
    """A command with our help, whose `--at CHUNK PROMPT` takes two values.

    Typer has no options that are pairs and repeatable.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse `--at 5 "a prompt"` as `--at "5 a prompt"`, up to `--`.

        Raises UsageError for arguments left over, such as the second word of a prompt.
        """
        end = args.index("--") if "--" in args else len(args)
        joined: list[str] = []
        for argument in args[:end]:
            if joined[-2:-1] == ["--at"] and _has_its_prompt_apart(joined[-1], argument):
                joined[-1] += f" {argument}"
            else:
                joined.append(argument)
        ctx.meta[WORDS] = joined
        ctx.allow_extra_args = True  # Typer's own error cannot tell that quotes are missing
        with _errors_name(ctx):
            left = super().parse_args(ctx, joined + args[end:])
        if left and not ctx.resilient_parsing:
            prompt = ctx.params.get("prompt")
            words = shlex.quote(" ".join([prompt, *left])) if isinstance(prompt, str) else ""
            hint = f"quote the prompt: {ctx.command_path} {words}"
            raise UsageError(
                f"unexpected argument {left[0]!r}.",
                hint=hint if words else f"{ctx.command_path} --help",
            )
        return left

    def invoke(self, ctx: Any) -> Any:
        """Call the command, with `~` in paths expanded, and with garbage collection."""
        ctx.params = {name: _at_home(value) for name, value in ctx.params.items()}
        gc.freeze()  # what was imported so far stays
        gc.enable()
        return super().invoke(ctx)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, as plain text."""
        formatter.write(help_text(self, ctx, ctx.meta[WORDS]))


class WancliGroup(TyperGroup):
    """Commands by name. Alone it prints its help; an unknown name is answered by a near one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments of the group. Exit 2, with the help, where there are none."""
        ctx.meta[WORDS] = args
        if args or ctx.resilient_parsing:
            return super().parse_args(ctx, args)
        with suppress(typer.Exit):
            super().parse_args(ctx, ["--help"])
        raise typer.Exit(2)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, as plain text."""
        formatter.write(help_text(self, ctx, ctx.meta[WORDS]))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Name, command and remaining arguments. Raises UsageError for an unknown name."""
        unknown = self.get_command(ctx, args[0]) is None and not args[0].startswith("-")
        if unknown and not ctx.resilient_parsing:
            near = closest(args[0], self.commands)
            hint = f"did you mean '{near}'?" if near else f"{ctx.command_path} --help"
            raise UsageError(f"No such command {args[0]!r}.", hint=hint)
        return super().resolve_command(ctx, args)


@dataclass(frozen=True)
class Entry:
    """A command to import, `module:name`, and its line in the list of commands."""

    target: str
    help: str

    def load(self, name: str) -> Any:
        """Import the command or the group and make it ready to be called."""
        return _command(self.target, name)


@cache
def _command(target: str, name: str) -> Any:
    """The command or the group at `module:name`, made once in a process: 10 ms of a call."""
    module, _, attribute = target.partition(":")
    entry = getattr(import_module(module), attribute)
    if isinstance(entry, typer.Typer):
        return get_command(entry)
    app = typer.Typer(add_completion=False)
    app.command(name, cls=WancliCommand)(entry)
    return get_command(app)


def lazy(entries: Mapping[str, Entry]) -> type[TyperGroup]:
    """A group that lists `entries` and imports the one that is called."""

    class Lazy(WancliGroup):
        """Commands that cost nothing until they are called."""

        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            lines = {name: TyperCommand(name, help=entry.help) for name, entry in entries.items()}
            self.commands.update(lines)

        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            """Name, imported command and remaining arguments."""
            name, command, rest = super().resolve_command(ctx, args)
            return name, entries[name].load(name) if name else command, rest

    return Lazy
