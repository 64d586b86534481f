"""Command lines that only tell: in forks of a process without torch, for the tests of every day."""

from collections.abc import Iterator

from tests.fuzz import lines
from tests.fuzz.campaign import Case
from tests.fuzz.judge import Fault

SIZE = 40


def attempt(case: Case) -> Iterator[Fault]:
    """One line, and what is wrong with what it did."""
    yield from lines.judged(case, lines.make_line(case.chance, tells=True))
