"""Printing: results to stdout, everything else to stderr."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from random import randrange
from time import monotonic
from typing import TYPE_CHECKING, Any

from wancli.cli.messages import use_color, with_flags, write_result
from wancli.cli.options import OutputOptions
from wancli.cli.terminal_images import Place, find_encode
from wancli.errors import UsageError
from wancli.utils.interrupts import unwind_from_here

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from wancli.records.progress import Event, Report
    from wancli.records.record import Request, RunRecord

WIDE = 200  # columns of a table in a file
SHOWN = 10  # rows at either end of a long table
LINE_EVERY_S = 10  # seconds between lines of progress without a terminal
OnBytes = Callable[[int], None]  # bytes downloaded so far
ROWS = 8  # terminal lines of a preview


class Screen:
    """Prints results, progress and errors by the user's output options."""

    def __init__(self, output_options: OutputOptions) -> None:
        self.options = output_options
        self._color = output_options.color is not False and not os.environ.get("NO_COLOR")

    @cached_property
    def err(self) -> "Console":
        """The console on stderr; opening it imports Rich."""
        from wancli.cli.console import open_console

        return open_console(stderr=True, color=self._color, soft_wrap=True)

    def say(self, text: str) -> None:
        """Print a line on stderr, unless --quiet."""
        if not self.options.quiet:
            self.err.print(with_flags(text), markup=False)

    def warn(self, text: str, *, hint: str) -> None:
        """Print a warning and a hint, also with --quiet."""
        from rich.text import Text

        text, hint = with_flags(text), with_flags(hint)
        self.err.print(Text.assemble(("warn:", "yellow"), f"  {text}  ", (f"hint: {hint}", "dim")))

    def result(self, text: str) -> None:
        """Print a line on stdout."""
        write_result(text)

    def json(self, value: Mapping[str, Any]) -> None:
        """Print a result as one line of JSON."""
        self.result(json.dumps(value, ensure_ascii=False))

    def table(
        self, *columns: str, rows: Sequence[tuple[str, ...]], right: tuple[str, ...] = ()
    ) -> None:
        """Print a table on stdout; columns in `right` are numbers."""
        from wancli.cli.table import table_lines

        here = sys.stdout.isatty() or "COLUMNS" in os.environ
        width = shutil.get_terminal_size().columns if here else WIDE
        bold = any(columns) and self._color and use_color(1)
        for line in table_lines(columns, rows, right=right, width=width):
            write_result(line, bold=bold)
            bold = False  # only the header

    def done(self, record: "RunRecord") -> None:
        """Print a finished video: its path or record on stdout, timings on stderr."""
        if record.status == "ok" and not self.options.quiet:
            self._timings(record)
        if self.options.json:
            self.json(record.as_json())
        else:
            self.result(str(record.output["path"]))

    def failed(self, record: "RunRecord") -> None:
        """Print the record of a failed video with --json; the error follows separately."""
        if self.options.json:
            self.json(record.as_json())

    def skipped(self, request: "Request", path: Path) -> None:
        """Print an existing video that was kept, which is a result too."""
        from wancli.records.record import SCHEMA

        if self.options.json:
            output = {"path": str(path)}
            self.json(
                {
                    "schema": SCHEMA,
                    "status": "skipped",
                    "hash": request.hash,
                    "output": output,
                }
            )
        else:
            self.result(str(path))

    @contextmanager
    def progress(self) -> Iterator["Report"]:
        """Show the progress of a runner: a bar on a terminal, else an occasional line."""
        unwind_from_here()
        if self.options.quiet:
            yield lambda event: None
        elif self._moves:
            with _bar(self.err, self._place(ROWS)) as report:
                yield report
        else:
            yield _Lines(self.err).report

    @contextmanager
    def transfer(self, total: int | None) -> Iterator[OnBytes]:
        """Show the progress of a download of `total` bytes."""
        unwind_from_here()
        if self.options.quiet:
            yield lambda done: None
        elif self._moves:
            with _transfer_bar(self.err, total) as update:
                yield update
        else:
            yield _transfer_lines(self.err, total)

    def confirm(self, question: str, *, otherwise: str) -> bool:
        """Whether the user answers yes. Raises UsageError without a terminal."""
        if not sys.stdin.isatty():
            raise UsageError(f"{question} There is no terminal to ask.", hint=otherwise)
        self.err.print(f"{question} [y/N] ", end="", markup=False)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def picture(self, png: bytes) -> None:
        """Show a picture as large as the terminal allows, if it supports pictures."""
        if place := self._place(self.err.height):
            _draw(self.err, place, png)

    @property
    def _moves(self) -> bool:
        """Whether bars may move the cursor; --no-color prints no escape codes at all."""
        return self.err.is_terminal and self.options.color is not False

    def _place(self, rows: int) -> Place | None:
        """Place for a picture of at most `rows` lines; None if pictures are not shown."""
        quiet = self.options.quiet or self.options.json or self.err.no_color
        if quiet or not self.err.file.isatty():
            return None
        encode = find_encode(os.environ)
        rows, columns = min(rows, self.err.height - 2), self.err.width
        if encode is None or rows < 1:
            return None
        return Place(encode, randrange(1, 2**31), columns=columns, rows=rows)

    def _timings(self, record: "RunRecord") -> None:
        timings = record.timings
        if chunks := timings.get("chunks"):
            self._chunks(chunks)
        elif steps := timings.get("steps_ms"):
            self.err.print(_steps_table(steps, timings))
        spent = {name.removesuffix("_s"): s for name, s in timings.items() if name.endswith("_s")}
        self.say("  ".join(f"{name} {seconds:.2f} s" for name, seconds in spent.items()))
        if fps := timings.get("fps"):
            rates = "  ".join(f"{name.replace('_', ' ')} {rate:.1f}" for name, rate in fps.items())
            kv = timings["kv_bytes"] / 2**20
            self.say(f"video frames per second: {rates}  rolling K/V {kv:.1f} MiB")
        if cache := record.cache:
            self._reuse(cache)
        for note in record.drift.get("notes", []):
            self.say(f"drift: {note}")
        peaks = (
            f"{name.removesuffix('_peak_gib').upper()} {gib:.2f} GiB"
            for name, gib in record.memory.items()
            if name.endswith("_peak_gib")
        )
        self.say(f"peak {'  '.join(peaks)}  seed {record.request['seed']}")

    def _reuse(self, cache: Mapping[str, Any]) -> None:
        reused, forwards = cache["reused"], cache["forwards"]
        share = cache["blocks"] / (cache["blocks_all"] or 1)
        method = cache["method"]
        self.say(f"{method}: {reused} of {forwards} forwards reused, {share:.0%} of the blocks run")
        if not reused:
            self.warn(
                f"{method}: nothing was reused.",
                hint="a higher threshold, which wancli bench --tune finds, or fewer warmup steps",
            )

    def _chunks(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print the timings of each chunk; of many chunks, the first and last."""
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        columns = (
            "chunk",
            "steps",
            "step ms",
            "clean ms",
            "decode ms",
            "write ms",
            "K/V tokens",
            "frames",
        )
        for column in columns:
            table.add_column(column, justify="right")
        shown = [*rows[:SHOWN], None, *rows[-SHOWN:]] if len(rows) > 2 * SHOWN + 1 else rows
        for row in shown:
            if row is None:
                table.add_row(*["…"] * len(columns))
                continue
            steps, name = row["steps_ms"], row["chunk"]
            mean = f"{sum(steps) / len(steps):.0f}" if steps else "kept" if name >= 0 else "given"
            rest = (f"{row[key]:.0f}" for key in ("clean_ms", "decode_ms", "write_ms"))
            counts = (str(row["kv_tokens"]), str(row["video_frames"]))
            table.add_row(str(name), str(len(steps)), mean, *rest, *counts)
        self.err.print(table)


class _Lines:
    """Progress for logs: a line per phase, and one every `LINE_EVERY_S` seconds."""

    def __init__(self, console: "Console") -> None:
        self._console, self._since, self._last = console, monotonic(), monotonic()

    def report(self, event: "Event") -> None:
        """Print a line for a new phase, or if the last one is old enough."""
        from wancli.records.progress import Phase, Step

        now = monotonic()
        if isinstance(event, Phase):
            self._since = self._last = now
            self._console.print(event.name, markup=False)
        elif isinstance(event, Step) and now - self._last >= LINE_EVERY_S:
            self._last = now
            done = event.index + 1
            each = (now - self._since) / done
            left = int(each * (event.total - done))
            self._console.print(
                f"step {done}/{event.total} {done / event.total:.0%} "
                f"{1000 * each:.0f} ms/step eta {left // 60}:{left % 60:02}",
                markup=False,
            )


def _steps_table(steps: Sequence[float], timings: Mapping[str, Any]) -> "Table":
    """Timings of each step, and what each branch of a step cache computed."""
    from rich.table import Table

    uses: Sequence[Mapping[str, Any]] = timings.get("uses", ())
    branches = list(dict.fromkeys(use["branch"] for use in uses))
    cells_of = {(use["step"], use["branch"]): _use(use) for use in uses}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("step", "sigma", *(branches or ["forwards"]), "ms", "share"):
        table.add_column(column, justify="right")
    rows = zip(timings["sigmas"], timings["forwards"], steps, strict=True)
    for index, (sigma, forwards, ms) in enumerate(rows):
        cells = [cells_of.get((index, branch), "") for branch in branches] or [str(forwards)]
        share = f"{ms / (sum(steps) or 1):.1%}"
        table.add_row(str(index + 1), f"{sigma:.4f}", *cells, f"{ms:.0f}", share)
    return table


def _use(use: Mapping[str, Any]) -> str:
    """`reused 1/30 0.043`: blocks that ran, of all, and the residual that decided."""
    word = "computed" if not use["reused"] else "reused" if use["blocks"] else "skipped"
    residual = "" if use["residual"] is None else f" {use['residual']:.3f}"
    return f"{word} {use['blocks']}/{use['blocks_all']}{residual}"


@contextmanager
def _bar(console: "Console", place: Place | None) -> Iterator["Report"]:
    """Show a progress bar, with previews above it."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from wancli.records.progress import Phase, Step

    columns = (
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def report(event: "Event") -> None:
            if isinstance(event, Phase):
                bar.reset(task, description=event.name, total=None)
            elif isinstance(event, Step):
                bar.update(task, completed=event.index + 1, total=event.total)
            elif place:
                _draw(console, place, event.png)

        yield report


def _draw(console: "Console", place: Place, png: bytes) -> None:
    """Write a picture's escape codes; a bar on the console moves below it."""
    from rich.segment import ControlType, Segment, Segments

    control = [(ControlType.CURSOR_UP, 0)]  # marks it as control codes, which are not escaped
    console.print(Segments([Segment(place.draw(png), None, control)]), end="")


def _transfer_lines(console: "Console", total: int | None) -> OnBytes:
    """Progress of a download for logs; `total` is in bytes."""
    last = monotonic()

    def update(done: int) -> None:
        nonlocal last
        if monotonic() - last >= LINE_EVERY_S:
            last = monotonic()
            of = f" of {total / 1e9:.2f} GB {done / total:.0%}" if total else " GB"
            console.print(f"{done / 1e9:.2f}{of}", markup=False)

    return update


@contextmanager
def _transfer_bar(console: "Console", total: int | None) -> Iterator[OnBytes]:
    """Progress of a download for terminals."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("download", total=total)
        yield lambda done: progress.update(task, completed=done)
