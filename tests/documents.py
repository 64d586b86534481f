"""README.md and the pages of docs/: their fenced blocks, the commands in these, and their links."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
GENERATED = {"docs/cli.md"}
# A block runs unless a comment before it says otherwise: `plan` its commands are planned (weights
# or a GPU are missing here), `parse` their flags are checked, `skip` it is about something else.
MARKS = {"", "plan", "parse", "skip"}
_FENCE = re.compile(
    r"(?:^<!-- docs-test: (?P<mark>\w+)[^\n]*-->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_FILE = re.compile(r"# (?P<path>[\w./-]+\.(?:toml|jsonl|py))\n")
_HEREDOC = re.compile(r"<<'(\w+)'(.*?)\n.*?\n\1$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^]]*\]\((?!https?:)(?P<target>[^)#\s]*)(?:#(?P<anchor>[^)\s]*))?\)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str  # from the root: docs/caches.md
    line: int  # of its fence
    language: str
    text: str
    mark: str = ""

    @property
    def place(self) -> str:
        """For messages: `docs/caches.md:12`."""
        return f"{self.page}:{self.line}"

    @property
    def runs(self) -> bool:
        """Whether a test runs it."""
        return self.language in ("sh", "python") and not self.mark

    @property
    def file(self) -> str | None:
        """The file that it is the content of, if its first line is a comment that names one."""
        named = _FILE.match(self.text) if self.language not in ("sh", "") else None
        return named["path"] if named else None

    @property
    def commands(self) -> list[list[str]]:
        """Arguments of each `wancli` in a shell block."""
        return list(_commands(self.text)) if self.language == "sh" else []


def pages() -> list[str]:
    """README.md and the pages that people write."""
    names = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
    return ["README.md", *(name for name in names if name not in GENERATED)]


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = (ROOT / page).read_text()
    return [
        Block(
            page, text.count("\n", 0, match.start("language")) + 1, match["language"],
            match["text"], match["mark"] or "",
        )
        for match in _FENCE.finditer(text)
    ]  # fmt: skip


def all_blocks() -> list[Block]:
    """The blocks of all pages."""
    return [block for page in pages() for block in blocks(page)]


def _commands(script: str) -> Iterator[list[str]]:
    """What follows the word `wancli`, up to an operator; variables are 1."""
    script = _HEREDOC.sub(r"\2", script).replace("\\\n", " ")
    for line in script.splitlines():
        line = re.sub(r"(?<=\s)\d(?=>)", "", line)  # 2>FILE
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        arguments: list[str] | None = None
        for word in [*lexer, ";"]:
            if set(word) <= set("();<>|&"):
                if arguments is not None:
                    yield arguments
                arguments = None
            elif arguments is not None:
                arguments += [] if word == "$@" else [re.sub(r"\$\w+", "1", word)]
            elif word == "wancli":
                arguments = []


def links(page: str) -> list[tuple[str, str]]:
    """(file from the root, anchor) that a page links to within the repository."""
    prose = _FENCE.sub("", (ROOT / page).read_text())
    folder = (ROOT / page).parent
    return [
        (
            (folder / match["target"]).resolve().relative_to(ROOT).as_posix()
            if match["target"]
            else page,
            match["anchor"] or "",
        )
        for match in _LINK.finditer(prose)
    ]


def anchors(page: str) -> set[str]:
    """Anchors of the headings of a page, as GitHub and MkDocs make them."""
    prose = _FENCE.sub("", (ROOT / page).read_text())
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
