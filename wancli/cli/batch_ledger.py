"""`wancli batch status`, `retry`, `cancel` and `export`: the ledger of a batch."""

import csv
import io
import json
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wancli.cli.options import OutputOptions, Overwrite, takes_output_options
from wancli.errors import InputError, UsageError, some

if TYPE_CHECKING:
    from wancli.cli.screen import Screen
    from wancli.records.batch_status import BatchStatus
    from wancli.records.ledger import Ledger

SCHEMA = "wancli.batch/1"
_POLL_S = 1.0  # seconds between looks of `--watch`
_MOST = 20  # running jobs, and reasons of failures, that are printed
Existing = Annotated[
    Path, typer.Argument(metavar="LEDGER", help="The ledger of a batch, or the folder it is in.")
]
Lines = Annotated[
    list[int] | None,
    typer.Option("--line", metavar="N", help="Only jobs of this line of the file. Repeatable."),
]
Ids = Annotated[
    list[str] | None,
    typer.Option("--id", metavar="NAME", help="Only jobs with this id. Repeatable."),
]


@takes_output_options
def status(
    *,
    output_options: OutputOptions,
    ledger: Existing,
    watch: Annotated[
        bool, typer.Option("--watch", help="Refresh until no job waits or runs.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Check instead whether finished videos are intact.")
    ] = False,
) -> None:
    """Print how many jobs wait, run, are done or have failed, and why.

    --check reads every finished video, and tells which are missing or damaged (exit code 4).

    wancli batch status videos --watch
    """
    from wancli.cli.screen import Screen
    from wancli.records.batch_status import read_status
    from wancli.records.ledger import open_ledger

    screen = Screen(output_options)
    if watch and check:
        raise UsageError("`watch` and `check` do not go together.", hint="one after the other")
    with open_ledger(ledger) as opened:
        if check:
            _check(opened, screen)
        elif watch:
            _watch(opened, screen)
        else:
            _print(read_status(opened), opened, screen)


@takes_output_options
def retry(
    *,
    output_options: OutputOptions,
    ledger: Existing,
    missing: Annotated[
        bool, typer.Option("--missing", help="Done, and the video is missing or damaged.")
    ] = False,
    cancelled: Annotated[bool, typer.Option("--cancelled", help="Cancelled jobs.")] = False,
    line: Lines = None,
    id_: Ids = None,
) -> None:
    """Let failed jobs wait again, for the next `wancli batch`.

    --missing and --cancelled choose other jobs instead.
    """
    from wancli.cli.screen import Screen
    from wancli.records.ledger import CANCELLED, FAILED, open_ledger
    from wancli.records.ledger_file import batch_command
    from wancli.video.batch_check import damaged_jobs

    with open_ledger(ledger) as opened:
        failed = () if missing or cancelled else opened.rows(FAILED)
        gone = (row for row, _ in damaged_jobs(opened)) if missing else ()
        stopped = opened.rows(CANCELLED) if cancelled else ()
        count = opened.retry(_numbers(chain(failed, gone, stopped), line, id_))
    if not count:
        chosen = {"is missing or damaged": missing, "is cancelled": cancelled}
        states = " or ".join(state for state, flag in chosen.items() if flag) or "has failed"
        raise UsageError(f"no such job {states}.", hint=batch_command("status", ledger))
    Screen(output_options).result(_jobs(count, "wait", "again"))


@takes_output_options
def cancel(
    *, output_options: OutputOptions, ledger: Existing, line: Lines = None, id_: Ids = None
) -> None:
    """Cancel jobs that wait or run; those that run stop at their next step.

    wancli batch cancel videos --line 12
    """
    from wancli.cli.screen import Screen
    from wancli.records.ledger import PENDING, RUNNING, open_ledger
    from wancli.records.ledger_file import batch_command

    with open_ledger(ledger) as opened:
        count = opened.cancel(_numbers(opened.rows(PENDING, RUNNING), line, id_))
    if not count:
        raise UsageError("no such job waits or runs.", hint=batch_command("status", ledger))
    Screen(output_options).result(_jobs(count, "is" if count == 1 else "are", "cancelled"))


@takes_output_options
def export(
    *,
    output_options: OutputOptions,
    ledger: Existing,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", show_default="standard output",
                     help="JSON lines; CSV if it ends in .csv."),
    ] = None,
    csv_: Annotated[bool, typer.Option("--csv", help="CSV instead of JSON lines.")] = False,
    failed: Annotated[
        bool, typer.Option("--failed", help="Only failed jobs, as a file of jobs to run again.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Write all jobs with their state, times, error and record.

    wancli batch export videos --failed -o again.jsonl
    """
    from wancli.cli.screen import Screen
    from wancli.records.batch_export import export_row, flat_row, job_lines
    from wancli.records.ledger import FAILED, open_ledger

    screen = Screen(output_options)
    csv_ = csv_ or (output is not None and output.suffix.lower() == ".csv")
    if failed and csv_:
        raise UsageError("`failed` writes JSON lines.", hint="`output again.jsonl`")
    with open_ledger(ledger) as opened:
        settings = opened.settings()
        lines: Iterable[str]
        if failed:
            lines = (_json(job) for job in job_lines(opened.rows(FAILED), settings))
        elif csv_:
            lines = _csv([flat_row(row, settings) for row in opened.rows()])
        else:
            lines = (_json(export_row(row, settings)) for row in opened.rows())
        if output is None:
            for text in lines:
                screen.result(text)
        else:
            _write(output, lines, screen, ledger=opened.path, overwrite=overwrite)


def _write(
    output: Path, lines: Iterable[str], screen: "Screen", *, ledger: Path, overwrite: bool
) -> None:
    from wancli.utils.files import write_whole
    from wancli.utils.outputs import OutputFile, OutputSet

    outputs = OutputSet(overwrite=overwrite, reads=[ledger])
    outputs.add(OutputFile(output, "`output`"))
    with outputs.locked():
        content = "".join(f"{text}\n" for text in lines).encode(errors="replace")
        write_whole(output, content, hint="another `output`", overwrite=overwrite)
    screen.answer(str(output), {"schema": SCHEMA, "path": str(output), "bytes": len(content)})


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)


def _csv(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    columns = list(dict.fromkeys(chain.from_iterable(rows)))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="")
    for row in (dict(zip(columns, columns, strict=True)), *rows):
        text.seek(0)
        text.truncate()
        writer.writerow(row)
        yield text.getvalue()


def _numbers(
    rows: Iterable[Mapping[str, Any]], lines: Collection[int] | None, ids: Collection[str] | None
) -> list[int]:
    """Numbers of the jobs of these lines or ids, or of all."""
    every = not (lines or ids)
    return [
        row["number"]
        for row in rows
        if every or row["line"] in (lines or ()) or row["id"] in (ids or ())
    ]


def _jobs(count: int, verb: str, rest: str) -> str:
    """`1 job waits again`, `2 jobs wait again`."""
    if count == 1:
        return f"1 job {verb if verb == 'is' else f'{verb}s'} {rest}"
    return f"{count:,} jobs {verb} {rest}"


def _check(ledger: "Ledger", screen: "Screen") -> None:
    """Print missing and damaged videos. Raises InputError if there are any."""
    from wancli.records.ledger import DONE, SKIPPED
    from wancli.records.ledger_file import batch_command
    from wancli.video.batch_check import damaged_jobs

    counts = ledger.counts()
    finished, failed = counts[DONE] + counts[SKIPPED], 0
    for row, result in damaged_jobs(ledger):
        failed += 1
        place = {"line": row["line"], "id": row["id"], "path": row["output"]}
        why = result.why and f": {result.why}"
        screen.answer(
            f"{result.status:9}  line {row['line']}  {row['output']}{why}",
            {"schema": SCHEMA, **place, **asdict(result)},
        )
    if failed:
        raise InputError(
            f"{failed:,} of {finished:,} finished videos are missing or damaged.",
            hint=batch_command("retry", ledger.path, "--missing"),
        )
    screen.note(f"{finished:,} finished videos are intact")


def _watch(ledger: "Ledger", screen: "Screen") -> None:
    """Print the status until no job waits or runs."""
    from wancli.records.batch_status import read_status

    if screen.options.json or not screen.moves:
        last = None
        while True:
            status = read_status(ledger)
            if status.counts != last:
                _print(status, ledger, screen)
            last = status.counts
            if status.ended:
                return
            time.sleep(_POLL_S)
    from rich.live import Live
    from rich.text import Text

    from wancli.utils.interrupts import unwind_from_here

    unwind_from_here()
    with Live(console=screen.err, auto_refresh=False, transient=True) as live:
        while not (status := read_status(ledger)).ended:
            live.update(Text("\n".join(_lines(status, ledger, screen.err.width))), refresh=True)
            time.sleep(_POLL_S)
    _print(status, ledger, screen)


def _print(status: "BatchStatus", ledger: "Ledger", screen: "Screen") -> None:
    if screen.options.json:
        screen.json({"schema": SCHEMA, "ledger": str(ledger.path), **asdict(status)})
        return
    for text in _lines(status, ledger, shutil.get_terminal_size().columns):
        screen.result(text)


def _lines(status: "BatchStatus", ledger: "Ledger", width: int) -> list[str]:
    """The status as lines of text."""
    from wancli.cli.messages import with_flags
    from wancli.cli.table import table_lines
    from wancli.records.ledger_file import batch_command
    from wancli.utils.units import duration

    lines = [in_words(status.counts)]
    if status.each_s is not None:
        left = status.left_s
        rest = f", about {duration(left)} left" if left and not status.ended else ""
        lines.append(f"{duration(status.each_s)} a video{rest}")
    if status.running:
        rows = [
            (
                f"line {job.line}", str(job.attempt), duration(job.seconds),
                f"{job.host} {job.pid}" if job.alive else "ended", Path(job.output).name,
            )
            for job in status.running[:_MOST]
        ]  # fmt: skip
        columns = ("running", "attempt", "for", "worker", "video")
        lines += ["", *table_lines(columns, rows, right=("attempt", "for"), width=width)]
        lines += _more(len(status.running) - _MOST, "running jobs")
    for reason in status.failed[:_MOST]:
        message, hint = with_flags(reason.message), with_flags(reason.hint)
        lines += ["", f"failed: {line_numbers(reason.lines)}: {message}"]
        lines += [f"hint:   {hint}"] if hint else []
    lines += _more(len(status.failed) - _MOST, "reasons")
    if status.failed and status.ended:
        lines += ["", f"again:  {batch_command('retry', ledger.path)}"]
    return lines


def line_numbers(lines: Sequence[int], *, unit: str = "line") -> str:
    """`line 3`, `lines 3, 5, 7 and 20 more`."""
    return f"{unit}{'s' * (len(lines) > 1)} {some([*map(str, lines)])}"


def _more(count: int, what: str) -> list[str]:
    return [f"and {count:,} more {what}"] if count > 0 else []


def in_words(counts: Mapping[str, int]) -> str:
    """`2 pending, 1 running, 3 done`."""
    return ", ".join(f"{number:,} {state}" for state, number in counts.items() if number)


COMMANDS = {"status": status, "retry": retry, "cancel": cancel, "export": export}
