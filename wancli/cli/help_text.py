"""Help as plain text, which is quick to draw and cuts nothing.

`--help` shows all of a short help, and of a long one the first groups and the names of the others;
`--help GROUP` shows one, `--help-all` all.
"""

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches
from itertools import pairwise
from shutil import get_terminal_size
from typing import Any

import typer

from wancli.cli.help import (
    ARGUMENTS,
    COMMANDS,
    INPUTS,
    OPTIONS,
    CommandHelp,
    HelpGroup,
    HelpRow,
    about,
    describe,
    typed_defaults,
)
from wancli.cli.messages import dashed
from wancli.errors import UsageError

NAMES = ("-h", "--help", "--help-all")
FIRST = (ARGUMENTS, OPTIONS, INPUTS)  # groups that `--help` shows
LONGEST = 60  # lines of a help that `--help` shows whole
WIDEST = 100  # columns
INDENT, COLUMN = 2, 30  # where names and their texts begin


def help_text(command: Any, ctx: Any, words: Sequence[str]) -> str:
    """The help that a command line asks for; `words` is what follows the command's name.

    Raises UsageError for a group that a long help does not have.
    """
    described = describe(command, ctx, typed_defaults(command, ctx, words))
    width = min(get_terminal_size().columns, WIDEST)
    flags = [dashed(word).lower() for word in words]
    keys = {word for name, word in pairwise(flags) if name in NAMES}
    chosen = [group for group in described.groups if group.key in keys]
    if chosen:
        whole = [replace(group, rows=[*group.common, *group.rows]) for group in chosen]
        lines = [line for group in whole for line in _group_lines(group, width)]
    else:
        lines = [*_lines(described, described.groups, width)]
        if len(lines) > LONGEST:
            _check_group(described, flags)
        if "--help-all" not in flags and len(lines) > LONGEST:
            first = [group for group in described.groups if group.title in FIRST]
            rest = [group for group in described.groups if group not in first]
            lines = [*_lines(described, first, width), *_more_lines(described, rest, width)]
    note = ["", *_wrapped(described.note, width)] if described.note else []
    return "\n".join([*lines, *note])


def _check_group(described: CommandHelp, flags: Sequence[str]) -> None:
    """Raise UsageError for a word after `--help`, which no group has for its name."""
    after = (word for name, word in pairwise(flags) if name in NAMES)
    if unknown := next((word for word in after if not word.startswith("-")), None):
        keys = [group.key for group in described.groups]
        near = get_close_matches(unknown, keys, n=len(keys), cutoff=0)
        raise UsageError(
            f"no group '{unknown}' in the help of {described.path}.", hint=f"use {', '.join(near)}"
        )


def _lines(described: CommandHelp, groups: Sequence[HelpGroup], width: int) -> Iterator[str]:
    yield from _wrapped(described.summary, width)
    yield from ("", f"{_bold('Usage:')} {described.usage}")
    for text in described.paragraphs:
        yield from ("", *_wrapped(text, width))
    for text in described.examples:
        yield from ("", *_example_lines(text, width))
    for group in groups:
        yield from ("", *_group_lines(group, width))


def _example_lines(text: str, width: int) -> Iterator[str]:
    """A command line, continued with backslashes before its flags where it is too long."""
    line, *flags = re.split(r" (?=--)", text)
    line = " " * INDENT + line
    for part in flags:
        if len(f"{line} {part}") > width - 2:
            yield f"{line} \\"
            line = " " * (2 * INDENT) + part
        else:
            line += f" {part}"
    yield line


def _group_lines(group: HelpGroup, width: int) -> Iterator[str]:
    yield _bold(f"{group.title}:")
    yield from _row_lines(group.rows, width, column=None if group.title == COMMANDS else COLUMN)


def _more_lines(described: CommandHelp, groups: Sequence[HelpGroup], width: int) -> Iterator[str]:
    """The names of the groups that are not shown, and how to see them."""
    yield from ("", _bold(f"More ({described.path} --help GROUP, or --help-all):"))
    rows = [HelpRow(group.key, about(group.title)) for group in groups]
    yield from _row_lines(rows, width, column=None)


def _row_lines(rows: Sequence[HelpRow], width: int, *, column: int | None) -> Iterator[str]:
    """Rows in two columns, the second at `column` or, for None, after the longest name.

    The text of a name that is too long stands below it.
    """
    column = column or 2 * INDENT + max(len(row.names) for row in rows)
    for row in rows:
        name = " " * INDENT + row.names
        text = _wrapped(row.text, width - column) or [""]
        if len(name) > column - 2:
            yield name
        else:
            yield f"{name:{column}}{text.pop(0)}".rstrip()
        yield from (" " * column + line for line in text)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of a text, broken at spaces only."""
    wide = max(width, COLUMN)
    return textwrap.wrap(text, wide, break_long_words=False, break_on_hyphens=False)


def _bold(text: str) -> str:
    return typer.style(text, bold=True)
