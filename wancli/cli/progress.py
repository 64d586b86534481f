"""Progress of a run or a download: a bar on a terminal, else a line now and then."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Event as Signal
from threading import Thread
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from wancli.cli.terminal_images import Place
from wancli.records.progress import (
    ChunkDone,
    Decoded,
    Event,
    Loading,
    Phase,
    Step,
)
from wancli.utils.units import gib

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.text import Text

LINE_EVERY_S = 10.0  # seconds between lines without a terminal
ROWS = 8  # terminal lines of a preview
_RECENT = 8  # parts that predict the next ones
_BAR, _LEAST_BAR = 40, 10  # columns
_PULSE = 6  # columns that move where the end is unknown
_DONE, _REST = "magenta", "dim"  # readable on light and dark backgrounds
Clock = Callable[[], float]


class Pace:
    """Seconds per part, from the recent ones.

    The first part is left out once there is a second, and of several the slowest is: they compile,
    or load an expert.
    """

    def __init__(self) -> None:
        self._first: float | None = None
        self._recent = deque[float](maxlen=_RECENT)

    def add(self, seconds: float) -> None:
        """Count a finished part."""
        if self._first is None:
            self._first = seconds
        else:
            self._recent.append(seconds)

    @property
    def settled(self) -> bool:
        """Whether parts besides the first are known."""
        return bool(self._recent)

    @property
    def each(self) -> float | None:
        """Seconds that the next part probably takes."""
        if not self._recent:
            return self._first
        usual = sorted(self._recent)[: -1 if len(self._recent) > 2 else None]
        return sum(usual) / len(usual)


class Progress(Protocol):
    """What a bar and a line show."""

    @property
    def name(self) -> str:
        """What is going on."""

    @property
    def fraction(self) -> float | None:
        """How much of it is done, 0 to 1; None if that is unknown."""

    def text(self) -> str:
        """Counts, and the time that is left."""


class RunProgress:
    """Progress of one video, from the events of its run."""

    def __init__(self, clock: Clock = monotonic) -> None:
        self._clock = clock
        self._start("start")

    def _start(self, phase: str) -> None:
        self.name = phase
        self.fraction: float | None = None
        self._began = self._last_step = self._last_chunk = self._clock()
        self._step: Step | None = None
        self._count = ""
        self._chunks_done = self._chunks = 0
        self._steps_pace, self._chunks_pace = Pace(), Pace()

    def handle(self, event: Event) -> None:
        """Take note of an event."""
        now = self._clock()
        if isinstance(event, Phase):
            self._start(event.name)
        elif isinstance(event, Loading):
            self._count = f"{event.part} {gib(event.done)} of {gib(event.total)}"
            self.fraction = event.done / event.total
        elif isinstance(event, Decoded):
            self._count = f"frame {event.frames}/{event.total}"
            self.fraction = event.frames / event.total
        elif isinstance(event, Step):
            self._step = event
            self._steps_pace.add(now - self._last_step)
            self._last_step = now
            self.fraction = (event.chunk + (event.index + 1) / event.total) / event.chunks
        elif isinstance(event, ChunkDone):
            self._chunks_done, self._chunks = event.index + 1, event.total
            if event.generated:
                self._chunks_pace.add(now - self._last_chunk)
            self._last_chunk = self._last_step = now
            self.fraction = self._chunks_done / event.total

    def text(self) -> str:
        """`step 12/30 40% 812 ms/step eta 0:14`; else counts and the time since the phase began."""
        step = self._step
        if self.fraction is None:
            return clock_time(self._since(self._began))
        if self._count:
            return f"{self._count} {self.fraction:.0%} {clock_time(self._since(self._began))}"
        if step is None:
            return f"chunk {self._chunks_done}/{self._chunks} {self.fraction:.0%}"
        chunk = f"chunk {step.chunk + 1}/{step.chunks} " if step.chunks > 1 else ""
        return f"{chunk}step {step.index + 1}/{step.total} {self.fraction:.0%} {self._left(step)}"

    def _left(self, step: Step) -> str:
        """The pace and the time left: `<` at most, `>` at least, as far as is known."""
        per_chunk = self._chunks_pace.each
        if step.chunks > 1 and per_chunk is not None:
            left = (step.chunks - self._chunks_done) * per_chunk - self._since(self._last_chunk)
            bound = "" if self._chunks_pace.settled else "< "
            return f"{_each(per_chunk)}/chunk eta {bound}{clock_time(left)}"
        steps = step.chunks * step.total - step.chunk * step.total - step.index - 1
        each = self._steps_pace.each or 0.0
        left = steps * each - self._since(self._last_step)
        bound = "> " if step.chunks > 1 else "" if self._steps_pace.settled else "< "
        return f"{_each(each)}/step eta {bound if steps else ''}{clock_time(left)}"

    def _since(self, then: float) -> float:
        return self._clock() - then


class TransferProgress:
    """Progress of a download of `total` bytes."""

    name = "download"

    def __init__(self, total: int | None, clock: Clock = monotonic) -> None:
        self._total, self._clock = total, clock
        self._done, self._began = 0, clock()
        self._kept: int | None = None  # bytes of an earlier download

    def update(self, done: int) -> None:
        """Take note of the bytes so far."""
        self._kept = done if self._kept is None else self._kept
        self._done = done

    @property
    def fraction(self) -> float | None:
        """How much is downloaded; None without a total."""
        return min(1.0, self._done / self._total) if self._total else None

    def text(self) -> str:
        """`1.20 of 3.40 GB 35% 56.0 MB/s eta 0:39`."""
        seconds = self._clock() - self._began
        rate = (self._done - (self._kept or 0)) / seconds if seconds else 0.0
        speed = f"{rate / 1e6:.1f} MB/s"
        if not self._total:
            return f"{self._done / 1e9:.2f} GB {speed}"
        left = f" eta {clock_time((self._total - self._done) / rate)}" if rate else ""
        amount = f"{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB"
        return f"{amount} {self.fraction:.0%} {speed}{left}"


def clock_time(seconds: float) -> str:
    """`0:14`, `1:02:03`."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _each(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 2 else f"{seconds:.1f} s"


class _Line:
    """A line with a bar, drawn anew at each refresh."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> Iterator["Text"]:
        yield bar_line(self._progress, width=options.max_width - 1, ascii_only=options.ascii_only)


def bar_line(progress: Progress, *, width: int, ascii_only: bool = False) -> "Text":
    """The name, a bar as wide as there is room for, and the counts."""
    from rich.text import Text

    name, counts, fraction = f"{progress.name:>8} ", f" {progress.text()}", progress.fraction
    size = min(_BAR, width - len(name) - len(counts))
    done, rest = "=-" if ascii_only else "━─"
    line = Text(name, no_wrap=True)
    if size >= _LEAST_BAR:
        start, filled = 0, round(size * (fraction or 0))
        if fraction is None:
            start, filled = int(10 * monotonic()) % (size - _PULSE + 1), _PULSE
        line.append(rest * start, _REST).append(done * filled, _DONE)
        line.append(rest * (size - start - filled), _REST)
    line.append(counts)
    line.truncate(width)
    return line


class _Bars:
    """A line for each progress; there may be more at the next refresh."""

    def __init__(self, progresses: Iterable[Progress]) -> None:
        self._progresses = progresses

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> Iterator[_Line]:
        yield from map(_Line, self._progresses)


@contextmanager
def bars(console: "Console", progresses: Iterable[Progress]) -> Iterator[None]:
    """Show a bar for each progress, below what is printed."""
    from rich.live import Live

    shown, redirects = _Bars(progresses), os.isatty(1)  # what is printed in a file stays there
    with Live(
        shown, console=console, transient=True, refresh_per_second=10, redirect_stdout=redirects
    ):
        yield


@contextmanager
def lines(console: "Console", progress: Progress) -> Iterator[None]:
    """Print lines from a thread: most phases report nothing for a long time."""
    done = Signal()

    def print_lines() -> None:
        while not done.wait(LINE_EVERY_S):
            text = progress.text()
            counted = progress.fraction is not None
            console.print(text if counted else f"{progress.name} {text}", markup=False)

    thread = Thread(target=print_lines, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def draw_picture(console: "Console", place: Place, png: bytes) -> None:
    """Write a picture's escape codes; a bar on the console moves below it."""
    from rich.segment import ControlType, Segment, Segments

    control = [(ControlType.CURSOR_UP, 0)]  # marks it as control codes, which are not escaped
    console.print(Segments([Segment(place.draw(png), None, control)]), end="")
