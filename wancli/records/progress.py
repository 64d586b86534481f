"""Progress events that a runner reports."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from wancli.errors import PlanWarning
from wancli.records.record import Request, RunRecord


@dataclass(frozen=True)
class Phase:
    """The phase that begins: import, load, encode, compile, denoise or rollout, decode, write."""

    name: str


@dataclass(frozen=True)
class Loading:
    """A part of the model whose weights are read next."""

    part: str
    done: int  # bytes of the parts before it
    total: int  # bytes of all parts


@dataclass(frozen=True)
class Decoded:
    """Video frames that the VAE has decoded."""

    frames: int
    total: int


@dataclass(frozen=True)
class Step:
    """A finished denoising step of a video, or of a chunk of it."""

    index: int  # from 0
    total: int
    sigma: float
    chunk: int = 0  # from 0
    chunks: int = 1


@dataclass(frozen=True)
class ChunkDone:
    """A finished chunk of a rollout."""

    index: int  # from 0
    total: int
    generated: bool  # False: kept from an earlier run


@dataclass(frozen=True)
class PreviewEvent:
    """A preview of the video being denoised, as a small PNG."""

    png: bytes


Event = Phase | Loading | Step | ChunkDone | Decoded | PreviewEvent


Report = Callable[[Event], None]


def ignore(_event: Event) -> None:
    """Report nothing."""


class Observer(Protocol):
    """Receives a run's reports: the command line's screen, or a Python caller."""

    def note(self, text: str) -> None:
        """Report a note."""

    def warn(self, text: str, *, hint: str) -> None:
        """Report a warning."""

    def progress(self) -> AbstractContextManager[Report]:
        """Report the progress of one video within the block."""

    def done(self, record: "RunRecord") -> None:
        """Report a finished video."""

    def skipped(self, request: Request, path: Path) -> None:
        """Report a video that already exists."""

    def failed(self, record: "RunRecord") -> None:
        """Report a failed video, before its error is raised."""


def report_warnings(warnings: Iterable[PlanWarning], observer: Observer) -> None:
    """Report the warnings of a valid request."""
    for warning in warnings:
        observer.warn(warning.text, hint=warning.hint)
