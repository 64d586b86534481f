"""Progress events that a runner reports."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from wancli.catalog.vocabulary import HINT
from wancli.records.record import Request, RunRecord


@dataclass(frozen=True)
class Phase:
    """What the runner does from now on: load, encode, denoise, decode or write."""

    name: str


@dataclass(frozen=True)
class Step:
    """One denoising step, done."""

    index: int  # from 0
    total: int
    sigma: float


@dataclass(frozen=True)
class PreviewEvent:
    """Where a video is heading, as a small PNG."""

    png: bytes


Event = Phase | Step | PreviewEvent


Report = Callable[[Event], None]


class Observer(Protocol):
    """Where a run reports to: the command line's screen, or a caller in Python."""

    def say(self, text: str) -> None:
        """A remark."""

    def warn(self, text: str, *, hint: str) -> None:
        """A remark that should not be missed."""

    def progress(self) -> AbstractContextManager[Report]:
        """Where one video's progress goes."""

    def done(self, record: "RunRecord") -> None:
        """A finished video."""

    def skipped(self, request: Request, path: Path) -> None:
        """A video that was there already."""

    def failed(self, record: "RunRecord") -> None:
        """A video that failed; the error is raised after this."""


def say_warnings(warnings: Iterable[str], observer: Observer) -> None:
    """What is to be said of a request, once nothing is wrong with it."""
    for text in warnings:
        observer.warn(text, hint=HINT)
