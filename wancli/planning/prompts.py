"""Prompt schedule of a rollout: changes by chunk, optionally blended in."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wancli.errors import InputError, PlanError, UsageError, missing, shortened
from wancli.utils.reading import parse_json, read_lines, read_toml, unreadable


@dataclass(frozen=True)
class PromptChange:
    """Another prompt from chunk `chunk` on (counted from 0)."""

    chunk: int
    prompt: str


@dataclass(frozen=True)
class BlendedPrompt:
    """A blend of `old` and `new`, weighted by `share` of `new`."""

    old: str
    new: str
    share: float = 1.0
    changes: bool = False  # first chunk of the new prompt


@dataclass(frozen=True)
class PromptSchedule:
    """The first prompt and its changes, in order."""

    prompt: str
    changes: tuple[PromptChange, ...] = ()
    blend: int = 0  # chunks over which a new prompt is blended in
    prefix: str = ""  # of a new prompt, in its first chunk

    @property
    def prompts(self) -> list[str]:
        """All prompts, in order."""
        new = [change.prompt for change in self.changes]
        return [self.prompt, *(self._first(prompt) for prompt in new if self.prefix), *new]

    def _first(self, prompt: str) -> str:
        return f"{self.prefix} {prompt}" if self.prefix else prompt

    def at(self, chunk: int) -> BlendedPrompt:
        """The prompt of a chunk; chunks of the initial context have negative numbers."""
        past = [change for change in self.changes if change.chunk <= chunk]
        if not past:
            return BlendedPrompt(self.prompt, self.prompt)
        before = past[-2].prompt if len(past) > 1 else self.prompt
        since = chunk - past[-1].chunk
        share = min(1.0, (since + 1) / self.blend) if self.blend else 1.0
        new = past[-1].prompt if since else self._first(past[-1].prompt)
        return BlendedPrompt(before, new, share, changes=since == 0)


def check_prompt(text: str) -> str:
    """The prompt without space around it. Raises UsageError for one that is empty, or no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"the prompt {shortened(text)} is not UTF-8 text.", hint="plain text"
        ) from None
    if not text.strip():
        raise UsageError("the prompt is empty.", hint='a description in quotes: "a red circle"')
    return text.strip()


def make_prompt_schedule(
    prompt: str, changes: Sequence[PromptChange], *, chunks: int, blend: int = 0, prefix: str = ""
) -> PromptSchedule:
    """Sort and check the changes. Raises PlanError for one beyond the end or two at once."""
    ordered = tuple(sorted(changes, key=lambda change: change.chunk))
    numbers = [change.chunk for change in ordered]
    for change in ordered:
        if not change.prompt.strip():
            raise UsageError(f"the prompt at chunk {change.chunk} is empty.", hint='`at` 5 "…"')
        if not 1 <= change.chunk < chunks:
            raise PlanError(
                f"no chunk {change.chunk} to change the prompt at: the last is {chunks - 1}.",
                hint=f"`chunks {change.chunk + 1}`"
                if change.chunk > 0
                else "pass it as the prompt",
            )
        if numbers.count(change.chunk) > 1:
            raise PlanError(f"two prompts for chunk {change.chunk}.", hint="drop one of them")
    return PromptSchedule(prompt, ordered, blend, prefix)


def parse_change(text: str) -> PromptChange:
    """Parse `5 a blue circle` or `5: a blue circle`. Raises UsageError."""
    number, _, prompt = text.strip().partition(" ")
    if not re.fullmatch(r"\d{1,18}:?", number):
        raise UsageError(
            f"`at` {shortened(number)} is not the number of a chunk.",
            hint='`at` 5 "a blue circle"',
        )
    if not prompt.strip():
        raise UsageError(f"`at` {number} has no prompt.", hint=f'`at` {number} "a blue circle"')
    return PromptChange(int(number.removesuffix(":")), prompt.strip())


def read_script(path: Path) -> list[PromptChange]:
    """Read changes from TOML (`[[at]]` with chunk and prompt) or JSON lines. Raises InputError."""
    try:
        if path.suffix == ".toml":
            tables = read_toml(path)
            rows = tables.pop("at", [])
            if tables:
                raise ValueError(f"unknown key {shortened(min(tables))}")
        else:
            rows = [parse_json(line) for line in read_lines(path)]
    except FileNotFoundError:
        raise missing("script", path) from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error, hint=_HINT) from None
    if not isinstance(rows, list):
        raise InputError(f"{path}: 'at' is not a list of tables.", hint=_HINT)
    return [_change(row, number, path) for number, row in enumerate(rows, 1)]


_HINT = 'JSON lines such as {"chunk": 5, "prompt": "a blue circle"}, or [[at]] tables in TOML'


def _change(row: Any, number: int, path: Path) -> PromptChange:
    well = isinstance(row, dict) and set(row) == {"chunk", "prompt"}
    if not well or type(row["chunk"]) is not int or not isinstance(row["prompt"], str):
        raise InputError(f"{path}: entry {number} is not a chunk and a prompt.", hint=_HINT)
    return PromptChange(row["chunk"], row["prompt"])
