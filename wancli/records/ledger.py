"""The ledger of a batch: which job waits, runs, is done or has failed, in one SQLite file.

It holds the jobs themselves, so that whoever opens it can work on them. A worker holds a lock
(`utils.locks`), which the kernel releases however the worker ends; the times in the ledger are for
people, and no clock decides who is alive. So a ledger is used from one machine, as its file
(`records.ledger_file`) has to be.
"""

import json
import os
import shlex
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Self

from wancli.errors import InputError, OutputError, RunError, UsageError, some
from wancli.records.ledger_file import (
    LedgerJob,
    LedgerSettings,
    connect,
    sqlite_errors,
    write_ledger,
)
from wancli.records.record import error_json
from wancli.utils.locks import FolderLock, NameLocked

MOST_DEATHS = 3  # of workers in one job: it is probably what they die of
PENDING, RUNNING, DONE, FAILED, SKIPPED, CANCELLED = STATES = (
    "pending", "running", "done", "failed", "skipped", "cancelled",
)  # fmt: skip
SUFFIX = ".ledger"
_WHERE = "wancli batch status FOLDER, that of the batch's outputs"


@dataclass(frozen=True)
class ClaimedJob:
    """A job that a worker has claimed. `attempt` counts from 1.

    `output` and `files`, those besides the video by the setting that asks for them, are final.
    """

    number: int
    attempt: int
    model: int
    command: str
    values: Mapping[str, Any]
    prompt: str | None
    seed: int | None
    output: Path
    files: Mapping[str, str] = field(default_factory=dict)


class Ledger:
    """An open ledger. Each process opens its own, after any fork."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        """Use `create_ledger` or `open_ledger`."""
        self.path, self._db, self._file = path, connection, path.stat()
        self.own_workers: set[str] = set()  # of this process, which are alive

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @property
    def digest(self) -> str:
        """Digest of the batch whose jobs these are."""
        with sqlite_errors(self.path):
            return str(self._db.execute("SELECT digest FROM batch").fetchone()[0])

    def counts(self) -> dict[str, int]:
        """The number of jobs in each state."""
        with sqlite_errors(self.path):
            rows = self._db.execute("SELECT state, count(*) FROM jobs GROUP BY state")
            return dict.fromkeys(STATES, 0) | dict(rows.fetchall())

    def rows(self, *states: str) -> Iterator[dict[str, Any]]:
        """Jobs in some states, or all, in the order of the file."""
        marks = ",".join("?" * len(states))
        where = f"WHERE state IN ({marks})" if states else ""
        with sqlite_errors(self.path):
            cursor = self._db.execute(f"SELECT * FROM jobs {where} ORDER BY number", states)
            names = [column[0] for column in cursor.description]
            for row in cursor:
                yield dict(zip(names, row, strict=True))

    def row(self, number: int) -> dict[str, Any]:
        """One job."""
        with sqlite_errors(self.path):
            cursor = self._db.execute("SELECT * FROM jobs WHERE number = ?", (number,))
            names = [column[0] for column in cursor.description]
            return dict(zip(names, cursor.fetchone(), strict=True))

    def numbers(self, *states: str) -> list[int]:
        """Numbers of the jobs in some states, or of all."""
        return [row["number"] for row in self.rows(*states)]

    def retry(self, numbers: Iterable[int]) -> int:
        """Let jobs wait again that have ended; returns how many.

        A cancelled one goes on if its worker has not learned of that: another that took it would
        find its files locked.
        """
        with sqlite_errors(self.path):
            query = "SELECT DISTINCT worker FROM jobs WHERE state = 'cancelled' AND worker NOTNULL"
            workers = [row[0] for row in self._db.execute(query)]
        at_it = json.dumps([worker for worker in workers if self.is_alive(worker)])
        goes_on = "state = 'cancelled' AND worker IN (SELECT value FROM json_each(?))"
        return self._move(
            numbers,
            f"worker = iif({goes_on}, worker, NULL), state = iif({goes_on}, 'running', 'pending'), "
            "error = NULL, ended = NULL, deaths = 0, failures = 0",
            at_it,
            at_it,
            of=(DONE, SKIPPED, FAILED, CANCELLED),
        )

    def cancel(self, numbers: Iterable[int]) -> int:
        """Cancel jobs that wait or run; returns how many.

        A worker learns of it at its next `beat`; a job that is done before that is done.
        """
        now = time.time()
        return self._move(numbers, f"state = 'cancelled', ended = {now}", of=(PENDING, RUNNING))

    def _move(self, numbers: Iterable[int], change: str, *values: object, of: Sequence[str]) -> int:
        """Change the rows of jobs in some states; returns how many."""
        marks = ",".join("?" * len(of))
        update = f"UPDATE jobs SET {change} WHERE number = ? AND state IN ({marks})"
        with self.transaction() as db:
            rows = ((*values, number, *of) for number in numbers)
            return db.executemany(update, rows).rowcount

    def settings(self) -> list[LedgerSettings]:
        """Settings of jobs; the index is the `settings` of a row."""
        with sqlite_errors(self.path):
            rows = self._db.execute("SELECT model, command, json FROM settings ORDER BY number")
            return [LedgerSettings(model, name, json.loads(text)) for model, name, text in rows]

    def waiting(self) -> dict[int, int]:
        """The number of jobs that wait, by the index of their settings."""
        with sqlite_errors(self.path):
            query = "SELECT settings, count(*) FROM jobs WHERE state = 'pending' GROUP BY settings"
            return dict(self._db.execute(query).fetchall())

    def seconds(self, most: int = 1000) -> list[tuple[int, float]]:
        """(index of the settings, seconds) of jobs that are done, at most so many.

        Jobs during which the clock was set back are left out.
        """
        with sqlite_errors(self.path):
            query = (
                "SELECT settings, ended - began FROM jobs WHERE state = 'done' "
                "ORDER BY model DESC, number DESC LIMIT ?"
            )
            rows = self._db.execute(query, (most,)).fetchall()
        return [(settings, seconds) for settings, seconds in rows if seconds >= 0]

    def next_prompts(self, job: ClaimedJob, *, most: int) -> list[str]:
        """Prompts of the next jobs that wait with the settings of a job."""
        query = (
            "SELECT prompt FROM jobs WHERE state = 'pending' AND model = ? AND prompt IS NOT NULL "
            "AND settings = (SELECT settings FROM jobs WHERE number = ?) LIMIT ?"
        )
        with sqlite_errors(self.path):
            rows = self._db.execute(query, (job.model, job.number, most)).fetchall()
        return list(dict.fromkeys(row[0] for row in rows))

    def writes_into(self, folder: Path) -> bool:
        """Whether any video has its name in that folder, whatever links lead there."""
        query = "SELECT DISTINCT rtrim(output, replace(output, '/', '')) FROM jobs"  # folders
        with sqlite_errors(self.path):
            folders = [Path(place).resolve() for (place,) in self._db.execute(query)]
        return any(place.is_relative_to(folder.resolve()) for place in folders)

    def sizes(self) -> tuple[int, int]:
        """The number of finished videos, and their bytes."""
        with sqlite_errors(self.path):
            query = "SELECT count(bytes), coalesce(sum(bytes), 0) FROM jobs WHERE state = 'done'"
            count, size = self._db.execute(query).fetchone()
        return count, size

    def is_alive(self, worker: str) -> bool:
        """Whether the worker of a row is still there."""
        return _is_alive(self.path, worker)

    def is_running(self) -> bool:
        """Whether somebody works on a job."""
        with sqlite_errors(self.path):
            query = "SELECT 1 FROM jobs WHERE state = 'running' LIMIT 1"
            return self._db.execute(query).fetchone() is not None

    def free_abandoned(self) -> list[ClaimedJob]:
        """Let the jobs of workers that have died wait again.

        Returns those that `MOST_DEATHS` workers have died in: they have failed, by `died_error`.
        """
        with sqlite_errors(self.path):
            query = "SELECT DISTINCT worker FROM jobs WHERE state = 'running'"
            others = {str(row[0]) for row in self._db.execute(query)} - self.own_workers
        dead = [worker for worker in others if not _is_alive(self.path, worker)]
        return [job for worker in dead for job in self.free(worker)]

    def free(self, worker: str) -> list[ClaimedJob]:
        """Let the jobs of one worker that has died wait again, as `free_abandoned` does."""
        ours = "state = 'running' AND worker = ?"
        with self.transaction() as db:
            db.execute(f"UPDATE jobs SET deaths = deaths + 1 WHERE {ours}", (worker,))
            most = f"SELECT number FROM jobs WHERE {ours} AND deaths >= {MOST_DEATHS}"
            failed = [claimed_job(db, row[0]) for row in db.execute(most, (worker,)).fetchall()]
            error = json.dumps(error_json(died_error()))
            db.executemany(
                "UPDATE jobs SET state = 'failed', ended = ?, error = ? WHERE number = ?",
                [(time.time(), error, job.number) for job in failed],
            )
            db.execute(f"UPDATE jobs SET state = 'pending', worker = NULL WHERE {ours}", (worker,))
        return failed

    def check_there(self) -> None:
        """Raise OutputError if the file was deleted or replaced since it was opened."""
        try:
            there = os.path.samestat(self._file, self.path.stat())
        except OSError:
            there = False
        if not there:
            raise OutputError(
                f"{self.path} was deleted or replaced while the batch ran.",
                hint="start the batch again with `skip_existing`; finished videos are kept",
            )

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A block of changes that happen all or not at all. Raises OutputError."""
        with sqlite_errors(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise


def died_error() -> RunError:
    """The error of a job that workers die in."""
    return RunError(
        f"the process that made it was killed {MOST_DEATHS} times.",
        hint="less memory: a smaller `size`, `offload group`; the same command tries again",
    )


def claimed_job(db: sqlite3.Connection, number: int) -> ClaimedJob:
    """A job as its worker makes it."""
    number, attempt, model, command, values, prompt, seed, output, files = db.execute(
        _CLAIMED, (number,)
    ).fetchone()
    return ClaimedJob(
        number, attempt, model, command, json.loads(values), prompt, seed, Path(output),
        json.loads(files or "{}"),
    )  # fmt: skip


_CLAIMED = """
SELECT jobs.number, attempt, jobs.model, command, json, prompt, seed, output, files
FROM jobs JOIN settings ON settings.number = jobs.settings WHERE jobs.number = ?
"""


def create_ledger(
    path: Path, digest: str, settings: Iterable[LedgerSettings], jobs: Iterable[LedgerJob], *,
    version: str,
) -> Ledger:  # fmt: skip
    """Write a ledger, or open the one of the same batch. Raises UsageError, OutputError."""
    if not os.path.lexists(path):
        write_ledger(path, digest, settings, jobs, version=version)
    return open_batch(path, digest)


def open_batch(path: Path, digest: str) -> Ledger:
    """Open the ledger of a batch. Raises UsageError for that of another, InputError."""
    ledger = open_ledger(path)
    if ledger.digest != digest:
        ledger.close()
        raise UsageError(
            f"{path} is the ledger of another batch, or of this one before its file, its "
            "presets, config.toml, WANCLI_MODEL or WANCLI_PRESET changed.",
            hint=f"`ledger {_another(path)}` `skip_existing` keeps videos of the same jobs",
        )
    return ledger


def _another(path: Path) -> str:
    """Name of a ledger that is not there yet, as it is typed into a shell."""
    names = (path.with_name(f"{path.stem}-{number}{SUFFIX}") for number in count(2))
    return shlex.quote(str(next(name for name in names if not os.path.lexists(name))))


def open_ledger(path: Path) -> Ledger:
    """Open an existing ledger, or the only one in a folder. Raises InputError, UsageError."""
    path = _only_one(path) if path.is_dir() else path
    if not path.exists():
        raise InputError(f"ledger '{path}' not found.", hint=_WHERE)
    return Ledger(path, connect(path))


def _only_one(folder: Path) -> Path:
    """The ledger in a folder. Raises InputError, UsageError."""
    paths = sorted(folder.glob(f"*{SUFFIX}"), key=_changed, reverse=True)
    if not paths:
        raise InputError(f"no ledger in '{folder}'.", hint=_WHERE)
    if len(paths) > 1:
        newest = some([shlex.quote(str(path)) for path in paths])
        raise UsageError(f"'{folder}' has {len(paths)} ledgers.", hint=f"one of: {newest}")
    return paths[0]


def _changed(path: Path) -> float:
    """When a ledger was changed, in seconds; its latest changes lie in a file beside it."""
    log = path.with_name(f"{path.name}-wal")
    return max(file.stat().st_mtime if file.exists() else 0.0 for file in (path, log))


def lock_worker(path: Path, worker: str) -> FolderLock:
    """Lock the name of a worker of a ledger. Raises NameLocked if it is alive.

    Raises UsageError where locks do not work: then nobody knows who is alive.
    """
    lock = FolderLock(path.parent)
    try:
        lock.acquire(f"{path.name}.{worker}")
        if not lock.works:
            raise UsageError(
                f"{path.parent} has no working locks, which a ledger needs.",
                hint="a `ledger` in a folder of your own, on a local disk",
            )
    except BaseException:
        lock.release()
        raise
    return lock


def _is_alive(path: Path, worker: str) -> bool:
    """Whether a worker holds its lock."""
    try:
        lock_worker(path, worker).release()
    except NameLocked:
        return True
    return False
