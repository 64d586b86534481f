"""Printing: results to stdout, everything else to stderr."""

import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from random import randrange
from time import monotonic
from typing import TYPE_CHECKING, Any

from wancli.cli.messages import use_color, with_flags, write_result
from wancli.cli.options import OutputOptions
from wancli.cli.terminal_images import Place, find_encode
from wancli.cli.timings import (
    chunks_table,
    in_lines,
    phases,
    process_start,
    rates,
    steps_table,
    whole_steps_table,
)
from wancli.errors import UsageError
from wancli.utils.interrupts import unwind_from_here

if TYPE_CHECKING:
    from rich.console import Console

    from wancli.cli.batch_run import BatchProgress
    from wancli.cli.progress import Progress
    from wancli.models.warm import OnBytes
    from wancli.records.progress import Report
    from wancli.records.record import Request, RunRecord

WIDE = 200  # columns of a table in a file


class Screen:
    """Prints results, progress and errors by the user's output options."""

    def __init__(self, output_options: OutputOptions) -> None:
        self.options = output_options
        self._color = output_options.color and not os.environ.get("NO_COLOR")
        self._since = process_start()  # or when the last video was done, by monotonic

    @cached_property
    def err(self) -> "Console":
        """The console on stderr; opening it imports Rich."""
        from wancli.cli.console import open_console

        return open_console(stderr=True, color=self._color, soft_wrap=True)

    def note(self, text: str) -> None:
        """Print a line on stderr, unless --quiet."""
        if not self.options.quiet:
            self.err.print(with_flags(text), markup=False)

    def warn(self, text: str, *, hint: str) -> None:
        """Print a warning and a hint, also with --quiet."""
        from rich.text import Text

        text, hint = with_flags(text), with_flags(hint)
        self.err.print(
            Text.assemble(("warn:", "yellow"), f"  {text}\n", ("hint:", "dim"), f"  {hint}")
        )

    def result(self, text: str) -> None:
        """Print a line on stdout."""
        write_result(text)

    def json(self, value: Mapping[str, Any]) -> None:
        """Print a result as one line of JSON."""
        self.result(json.dumps(value, ensure_ascii=False))

    def answer(self, text: str, value: Mapping[str, Any]) -> None:
        """Print a result: a line of text, or a value as JSON with --json."""
        self.json(value) if self.options.json else self.result(text)

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
        self.answer(str(record.output["path"]), record.as_json())

    def failed(self, record: "RunRecord") -> None:
        """Print the record of a failed video with --json; the error follows separately."""
        if self.options.json:
            self.json(record.as_json())

    def skipped(self, request: "Request", path: Path) -> None:
        """Print an existing video that was kept, which is a result too."""
        from wancli.records.record import SCHEMA

        value = {"schema": SCHEMA, "status": "skipped", "hash": request.hash}
        self.answer(str(path), {**value, "output": {"path": str(path)}})

    @contextmanager
    def progress(self) -> Iterator["Report"]:
        """Show the progress of a run: a bar with previews on a terminal, else lines."""
        from wancli.cli.progress import ROWS, RunProgress, draw_picture
        from wancli.records.progress import Event, Phase, PreviewEvent

        run = RunProgress()
        with self._showing([run], run) as moves:
            place = self._place(ROWS) if moves else None

            def report(event: Event) -> None:
                run.handle(event)
                if place and isinstance(event, PreviewEvent):
                    draw_picture(self.err, place, event.png)
                elif not moves and isinstance(event, Phase):
                    self.note(event.name)

            yield report

    @contextmanager
    def transfer(self, total: int | None) -> Iterator["OnBytes"]:
        """Show the progress of a download of `total` bytes."""
        from wancli.cli.progress import TransferProgress

        progress = TransferProgress(total)
        with self._showing([progress], progress):
            yield progress.update

    @contextmanager
    def batch_progress(self, progress: "BatchProgress") -> Iterator[None]:
        """Show the progress of a batch: a bar for each worker and one for all; else lines."""
        from wancli.cli.batch_run import BatchLine

        with self._showing(progress, BatchLine(progress)):
            yield

    @contextmanager
    def _showing(self, each: Iterable["Progress"], line: "Progress") -> Iterator[bool]:
        """Show bars that move, or print `line` now and then; yields whether they move."""
        unwind_from_here()
        from wancli.cli.progress import bars, lines

        quiet = self.options.quiet
        moves = not quiet and self.moves
        shown = nullcontext() if quiet else lines(self.err, line)
        with bars(self.err, each) if moves else shown:
            yield moves

    def confirm(self, question: str, *, otherwise: str) -> bool:
        """Whether the user answers yes. Raises UsageError without a terminal."""
        if not sys.stdin.isatty():
            raise UsageError(f"{question} There is no terminal to ask.", hint=otherwise)
        self.err.print(f"{question} [y/N] ", end="", markup=False)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def picture(self, png: bytes) -> None:
        """Show a picture as large as the terminal allows, if it supports pictures."""
        from wancli.cli.progress import draw_picture

        if place := self._place(self.err.height):
            draw_picture(self.err, place, png)

    @property
    def moves(self) -> bool:
        """Whether bars may move the cursor; --no-color prints no escape codes at all."""
        return self.err.is_terminal and self.options.color

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
        timings, width, whole = record.timings, self.err.width, self.options.verbose
        if chunks := timings.get("chunks"):
            self._numbers(*chunks_table(chunks, whole=whole))
        elif timings.get("steps_ms"):
            table = whole_steps_table(timings) if whole else steps_table(timings, width=width)
            self._numbers(*table)
        now = monotonic()
        start_s = max(0.0, now - self._since - timings["total_s"])
        self._since = now
        for items in (phases(timings, start_s=start_s), rates(timings)):
            for line in in_lines(items, width):
                self.note(line)
        if cache := record.cache:
            self._reuse(cache)
        for note in record.drift.get("notes", []):
            for part in note.split("; "):
                self.note(f"drift: {part}")
        peaks = (
            f"{name.removesuffix('_peak_gib').upper()} {gib:.2f} GiB"
            for name, gib in record.memory.items()
            if name.endswith("_peak_gib")
        )
        self.note(f"peak {'  '.join(peaks)}  seed {record.request['seed']}")

    def _numbers(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table of numbers on stderr."""
        from wancli.cli.table import table_lines

        lines = table_lines(columns, rows, right=columns, width=self.err.width)
        for number, line in enumerate(lines):
            self.err.print(line, style="" if number else "bold", markup=False)

    def _reuse(self, cache: Mapping[str, Any]) -> None:
        reused, forwards = cache["reused"], cache["forwards"]
        share = cache["blocks"] / (cache["blocks_all"] or 1)
        method = cache["method"]
        self.note(
            f"{method}: {reused} of {forwards} forwards reused, {share:.0%} of the blocks run"
        )
        if not reused:
            cachedit = method.startswith("cachedit")
            warmup = "a lower `cachedit_max_warmup_steps`" if cachedit else "fewer warmup steps"
            self.warn(
                f"{method}: nothing was reused.",
                hint=f"a higher threshold, which wancli bench --tune finds, or {warmup}",
            )
