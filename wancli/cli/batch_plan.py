"""The plan of a batch: checked before it begins, and printed by `--dry-run`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wancli.utils.disk import free_disk
from wancli.utils.units import duration, gib

if TYPE_CHECKING:
    from wancli.batches.plan import PlannedBatch
    from wancli.batches.workers import WorkerPlace
    from wancli.cli.screen import Screen
    from wancli.planning.jobs import BatchFile
    from wancli.planning.shards import Shard
    from wancli.records.ledger import Ledger


def new_batch(
    batch: "BatchFile", place: Path, shard: "Shard | None", *, skip_existing: bool,
    elsewhere: bool = False,
) -> tuple["PlannedBatch", set[str]]:  # fmt: skip
    """Plan a batch, or one share of it, that has not begun; `elsewhere` as for `plan_batch`.

    Also returns the videos that `skip_existing` keeps.
    """
    from wancli.api.requests import Listener
    from wancli.batches.outputs import check_new, kept_videos
    from wancli.batches.plan import plan_batch

    planned = plan_batch(batch, place, Listener(None), elsewhere=elsewhere)
    planned = planned.shard(shard) if shard else planned
    named = batch, planned.settings, planned.jobs
    check_new(*named, skip_existing=skip_existing)
    return planned, kept_videos(*named) if skip_existing else set()


def warn_of_comments(batch: "BatchFile", screen: "Screen") -> None:
    """Warn of prompts that look like comments: no kind of file has them, so videos are made."""
    from wancli.cli.batch_ledger import line_numbers
    from wancli.planning.job_rows import job_unit

    lines = list(dict.fromkeys(j.line for j in batch.jobs if (j.prompt or "").startswith("#")))
    if lines:
        where = f"{batch.origin}: {line_numbers(lines, unit=job_unit(batch.origin))}"
        screen.warn(
            f"{where}: a prompt that begins with '#' is no comment: its video is made.",
            hint="drop such lines",
        )


def show_new(
    planned: "PlannedBatch", ledger: Path, places: Sequence["WorkerPlace"], screen: "Screen", *,
    kept: set[str],
) -> None:  # fmt: skip
    """Print how much a batch is that has not begun, with warnings; with --json its jobs.

    `kept` are videos that exist.
    """
    for warning in planned.warnings:
        screen.warn(warning.text, hint=warning.hint)
    if screen.options.json:
        for job in planned.jobs:
            screen.json({"line": job.line, "seed": job.seed, "output": {"path": job.output}})
        return
    left = planned.without(kept)
    models = len({planned.settings[job.settings].model for job in left.jobs})
    whole = f" of {len(planned.jobs):,}" if kept else ""
    loaded = f", on {models} model{'s' * (models > 1)}" if models else ""
    seconds, count = left.seconds, max(1, len(places))
    workers = ", ".join(place.name for place in places) or f"1, on {' and '.join(planned.devices)}"
    unknown = "not known before wancli doctor --measure" if left.jobs else "nothing is left"
    rows = [
        ("videos", f"{len(left.jobs):,}{whole}{loaded}{'; the rest exists' if kept else ''}"),
        ("time", duration(seconds / count) if seconds else unknown),
        ("workers", workers),
        ("disk", f"{gib(free_disk(ledger))} free; how much videos take shows when some are made"),
        ("ledger", f"{ledger} (new)"),
    ]
    screen.table("", "", rows=rows)


def warn_of_folder(ledger: "Ledger", folder: Path, screen: "Screen") -> None:
    """Warn of a folder in which an existing ledger has no video: it keeps the names that it has."""
    if not ledger.writes_into(folder):
        screen.warn(
            f"{ledger.path} has the names of its videos: none is in `output_dir {folder}`.",
            hint="another `ledger` for another folder",
        )


def show_existing(ledger: "Ledger", places: Sequence["WorkerPlace"], screen: "Screen") -> None:
    """Print how far a batch is that has begun; with --json its jobs."""
    from wancli.cli.batch_ledger import in_words
    from wancli.records.batch_status import read_status

    with ledger:
        if screen.options.json:
            for row in ledger.rows():
                job = {name: row[name] for name in ("line", "seed", "state")}
                screen.json({**job, "output": {"path": row["output"]}})
            return
        status, (finished, size) = read_status(ledger), ledger.sizes()
    left = status.counts["pending"] + status.counts["running"] + status.counts["failed"]
    count = max(1, len(places))
    seconds = status.each_s * left / count if status.each_s else None
    unknown = "not known before one is done" if left else "nothing is left"
    disk = f"{gib(free_disk(ledger.path))} free"
    if finished and left:
        disk += f"; the rest takes about {gib(size / finished * left)}, like the {finished:,} done"
    rows = [
        ("videos", f"{sum(status.counts.values()):,}: {in_words(status.counts)}"),
        ("time", duration(seconds) if seconds else unknown),
        ("workers", ", ".join(place.name for place in places) or "1"),
        ("disk", disk),
        ("ledger", f"{ledger.path} (goes on)"),
    ]
    screen.table("", "", rows=rows)
