"""Commands that are imported when they are called, so that the others cost nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command


@dataclass(frozen=True)
class Entry:
    """Where a command is, `module:name`, and its line in the list of commands."""

    target: str
    help: str

    def load(self, name: str) -> Any:
        """The command, or the group, ready to be called."""
        module, _, attribute = self.target.partition(":")
        found = getattr(import_module(module), attribute)
        if isinstance(found, typer.Typer):
            return get_command(found)
        alone = typer.Typer(add_completion=False)
        alone.command(name)(found)
        return get_command(alone)


def lazy(entries: Mapping[str, Entry]) -> type[TyperGroup]:
    """A group of those commands."""

    class Lazy(TyperGroup):
        """Lists names and lines; loads what is called."""

        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            lines = {name: TyperCommand(name, help=entry.help) for name, entry in entries.items()}
            self.commands.update(lines)

        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            """Name, command and the arguments that are left for it."""
            name, command, rest = super().resolve_command(ctx, args)
            return name, entries[name].load(name) if name else command, rest

    return Lazy
