"""The whole command line as one document: `python -m wancli.cli.reference [markdown|man]`."""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import typer
from typer.main import get_command

from wancli.cli.app import COMMANDS, app
from wancli.cli.help import (
    GLOBAL,
    CommandHelp,
    Defaults,
    HelpGroup,
    HelpRow,
    defaults_under,
    describe,
)
from wancli.cli.messages import write_result
from wancli.cli.streams import open_streams
from wancli.config.presets import PACKAGED, layers, read_file
from wancli.errors import WancliError

_NEGATABLE = re.compile(r"--\[no-\]([\w-]+)")


def all_commands() -> Iterator[CommandHelp]:
    """Every command, with the defaults of the demo model, whatever the user's own are."""
    packaged = layers(read_file(PACKAGED / "demo.toml"))
    defaults = defaults_under([replace(layer, source="model default") for layer in packaged])
    root = get_command(app)
    context = typer.Context(root, info_name="wancli", **root.context_settings)
    yield describe(root, context, Defaults())
    for name, entry in COMMANDS.items():
        yield from _described(entry.load(name), name, context, defaults)


def _described(
    command: Any, name: str, parent: typer.Context, defaults: Defaults
) -> Iterator[CommandHelp]:
    """A command and those in it."""
    context = typer.Context(command, info_name=name, parent=parent)
    yield describe(command, context, defaults)
    for inner, subcommand in getattr(command, "commands", {}).items():
        yield from _described(subcommand, inner, context, defaults)


def _own_groups(command: CommandHelp) -> list[HelpGroup]:
    """All groups but the global options, which every command has."""
    return [group for group in command.groups if group.title != GLOBAL]


def _global_options(commands: Sequence[CommandHelp]) -> HelpGroup:
    return next(group for group in commands[0].groups if group.title == GLOBAL)


def exit_codes() -> dict[int, str]:
    """Meaning of every exit code, from the tree of errors."""
    codes = {0: "Done, or skipped because it exists.", 1: "Unexpected failure."}
    kinds: list[type[WancliError]] = [WancliError]
    while kinds:
        kind = kinds.pop(0)
        codes.setdefault(kind.exit_code, (kind.__doc__ or "").strip())
        kinds += kind.__subclasses__()
    return codes | {130: "Interrupted (SIGINT).", 143: "Terminated (SIGTERM)."}


def markdown() -> str:
    """The reference as Markdown: a section per command, a table per group of options."""
    root, *commands = all_commands()
    lines = ["# Command line", "", "Defaults are those of the demo model.", ""]
    lines += [*_markdown_of(root), "Every command takes", ""]
    lines += _markdown_group(_global_options(commands))
    for command in commands:
        lines += _markdown_of(command)
    lines += ["## Exit codes", "", "| code | meaning |", "|---|---|"]
    lines += [f"| {code} | {meaning} |" for code, meaning in exit_codes().items()]
    return "\n".join(lines)


def _markdown_of(command: CommandHelp) -> Iterator[str]:
    yield from (f"## {command.path}", "", command.summary, "", "```text", command.usage, "```", "")
    for text in command.paragraphs:
        yield from (_escaped(text), "")
    if command.examples:
        yield from ("```sh", *command.examples, "```", "")
    for group in _own_groups(command):
        yield from _markdown_group(group)


def _markdown_group(group: HelpGroup) -> Iterator[str]:
    yield from (f"**{group.title}**", "", "| | |", "|---|---|")
    for row in group.rows:
        yield f"| `{_names(row)}` | {_escaped(row.text)} |"
    yield ""


def _names(row: HelpRow) -> str:
    """Names as one searches for them: `--compile, --no-compile`."""
    return _NEGATABLE.sub(r"--\1, --no-\1", row.names.strip())


def _escaped(text: str) -> str:
    """Text without meaning to Markdown."""
    return re.sub(r"([|<*_\[\\])", r"\\\1", text)


def man() -> str:
    """The reference as a man page."""
    root, *commands = all_commands()
    lines = [
        ".TH WANCLI 1",
        ".nh",
        ".SH NAME",
        f"wancli \\- {_roff(root.summary)}",
        ".SH SYNOPSIS",
        _roff(root.usage),
    ]
    for group in (*root.groups, _global_options(commands)):
        lines += _man_group(group)
    for command in commands:
        lines += [f".SH {_roff(command.path.upper())}", _roff(command.summary), ".PP"]
        lines += [_roff(command.usage)]
        for text in command.paragraphs:
            lines += [".PP", _roff(text)]
        for text in command.examples:
            lines += [".PP", ".nf", _roff(text), ".fi"]
        for group in _own_groups(command):
            lines += _man_group(group, level="SS")
    lines += [".SH EXIT STATUS"]
    for code, meaning in exit_codes().items():
        lines += [".TP", f"\\fB{code}\\fR", _roff(meaning)]
    return "\n".join(lines)


def _man_group(group: HelpGroup, *, level: str = "SH") -> Iterator[str]:
    yield f".{level} {_roff(group.title.upper() if level == 'SH' else group.title)}"
    for row in group.rows:
        yield from (".TP", f"\\fB{_roff(_names(row))}\\fR", _roff(row.text))


def _roff(text: str) -> str:
    """Text as roff takes it; a line that begins with a dot or a quote is no request."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped[:1] in (".", "'") else escaped


FORMATS: dict[str, Callable[[], str]] = {"markdown": markdown, "man": man}


def main() -> None:
    """Print the reference."""
    open_streams()
    wanted = sys.argv[1] if len(sys.argv) > 1 else "markdown"
    if wanted not in FORMATS:
        raise SystemExit(f"usage: python -m wancli.cli.reference [{'|'.join(FORMATS)}]")
    write_result(FORMATS[wanted]())


if __name__ == "__main__":
    main()
