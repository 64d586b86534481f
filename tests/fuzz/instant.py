"""Command lines that only print, in forks of a process without torch: part of the default tests."""

from collections.abc import Iterator

from tests.fuzz import lines
from tests.fuzz.campaign import Case
from tests.fuzz.judge import Fault

SIZE = 40


def attempt(case: Case) -> Iterator[Fault]:
    """Run one line; yields its faults."""
    yield from lines.check_line(case, lines.make_line(case.rng, printing=True))
