"""The ledger of a batch: which job waits, runs, is done or has failed, in one SQLite file.

It holds the jobs themselves, so that whoever opens it can work on them. A worker holds a lock
(`utils.locks`), which the kernel releases however the worker ends; the times in the ledger are for
people, and no clock decides who is alive. So a ledger is used from one machine, as its file
(`records.ledger_file`) has to be.
"""

import json
import os
import secrets
import socket
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from wancli.errors import InputError, OutputError, RunError, UsageError, WancliError
from wancli.records.ledger_file import (
    LedgerJob,
    LedgerSettings,
    batch_command,
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


class JobCancelled(RunError):
    """A job that runs was cancelled, or is another worker's now: it stops."""


class Ledger:
    """An open ledger. Each process opens its own, after any fork."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        """Use `create_ledger` or `open_ledger`."""
        self.path, self._db, self._file = path, connection, path.stat()
        self._own: set[str] = set()  # workers of this process, which are alive

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
        with self._transaction() as db:
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
            others = {str(row[0]) for row in self._db.execute(query)} - self._own
        dead = [worker for worker in others if not _is_alive(self.path, worker)]
        return [job for worker in dead for job in self.free(worker)]

    def free(self, worker: str) -> list[ClaimedJob]:
        """Let the jobs of one worker that has died wait again, as `free_abandoned` does."""
        ours = "state = 'running' AND worker = ?"
        with self._transaction() as db:
            db.execute(f"UPDATE jobs SET deaths = deaths + 1 WHERE {ours}", (worker,))
            most = f"SELECT number FROM jobs WHERE {ours} AND deaths >= {MOST_DEATHS}"
            failed = [_claimed(db, row[0]) for row in db.execute(most, (worker,)).fetchall()]
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
    def _transaction(self) -> Iterator[sqlite3.Connection]:
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


class LedgerWorker:
    """One who takes jobs from a ledger; alive until `close`, or the end of the process."""

    def __init__(self, ledger: Ledger) -> None:
        self.name = secrets.token_hex(8)
        self._ledger, self._model = ledger, -1
        self._lock = FolderLock(ledger.path.parent)
        self._lock.acquire(_lock_name(ledger.path, self.name))
        _check_lock(self._lock, ledger.path)
        ledger._own.add(self.name)

    def close(self) -> None:
        """Give back what is claimed, and end."""
        try:
            with self._ledger._transaction() as db:
                db.execute(
                    "UPDATE jobs SET state = 'pending', worker = NULL "
                    "WHERE state = 'running' AND worker = ?",
                    (self.name,),
                )
        finally:  # without which others would wait for its jobs
            self._ledger._own.discard(self.name)
            self._lock.release()

    def claim(self) -> ClaimedJob | None:
        """The next job, of the same model while there is one; None if none waits.

        Raises OutputError if the ledger is gone: what is written to it then is lost.
        """
        self._ledger.check_there()
        with self._ledger._transaction() as db:
            first = "SELECT number FROM jobs WHERE state = 'pending' AND model = ? LIMIT 1"
            row = db.execute(first, (self._model,)).fetchone() or db.execute(_NEXT).fetchone()
            if row is None:
                return None
            (number,), now = row, time.time()
            db.execute(
                "UPDATE jobs SET state = 'running', attempt = attempt + 1, worker = ?, host = ?, "
                "pid = ?, began = ?, heartbeat = ?, ended = NULL, error = NULL WHERE number = ?",
                (self.name, socket.gethostname(), os.getpid(), now, now, number),
            )
            job = _claimed(db, number)
        self._model = job.model
        return job

    def beat(self, job: ClaimedJob) -> None:
        """Note that the job is being worked on. Raises JobCancelled."""
        if not self._change(job, "heartbeat = ?", (time.time(),)):
            hint = batch_command("retry", self._ledger.path, "--cancelled")
            raise JobCancelled("the job was cancelled.", hint=hint)

    def done(self, job: ClaimedJob, record: Mapping[str, Any], *, kept: bool = False) -> None:
        """Note that the video is whole under its final name; `kept`: it was there before.

        Raises OutputError if no file has that name.
        """
        try:
            size = job.output.stat().st_size
        except OSError as error:
            raise OutputError(
                f"{job.output} is not there: {error.strerror}.",
                hint=batch_command("retry", self._ledger.path),
            ) from None
        state, text = SKIPPED if kept else DONE, json.dumps(record)
        values = (state, time.time(), size, text)
        change = "state = ?, ended = ?, bytes = ?, record = ?"
        self._change(job, change, values, of=(RUNNING, CANCELLED))

    def stopped(self, job: ClaimedJob) -> None:
        """Note that this worker has left a cancelled job, which waits if it was retried since."""
        change = "worker = NULL, state = iif(state = 'running', 'pending', state)"
        self._change(job, change, (), of=(RUNNING, CANCELLED))

    def failed(self, job: ClaimedJob, error: WancliError) -> None:
        """Note why the job failed."""
        values = (FAILED, time.time(), json.dumps(error_json(error)))
        self._change(job, "state = ?, ended = ?, error = ?", values)

    def again(self, job: ClaimedJob, *, most: int) -> bool:
        """Let a job that failed wait again, unless it has so often; returns whether it waits."""
        change = "state = 'pending', worker = NULL, failures = failures + 1"
        return self._change(job, change, (), also=f"AND failures < {most:d}")

    def adapt(
        self, job: ClaimedJob, values: Mapping[str, Any], *,
        same_model: Callable[[Mapping[str, Any], Mapping[str, Any]], bool],
    ) -> bool:  # fmt: skip
        """Let a job, and those that wait with its settings, wait with others instead.

        Returns False if it is no longer this worker's.
        """
        text = json.dumps(values)
        with self._ledger._transaction() as db:
            ours = "number = ? AND worker = ? AND attempt = ? AND state = 'running'"
            row = (job.number, self.name, job.attempt)
            before = db.execute(f"SELECT settings FROM jobs WHERE {ours}", row).fetchone()
            if before is None:
                return False
            known = db.execute("SELECT number, model, command, json FROM settings").fetchall()
            models = [m for _, m, _, other in known if same_model(json.loads(other), values)]
            model = models[0] if models else 1 + max(m for _, m, _, _ in known)
            after = (number for number, *same in known if same == [model, job.command, text])
            if (number := next(after, None)) is None:
                number = len(known)
                new = (number, model, job.command, text)
                db.execute("INSERT INTO settings VALUES (?, ?, ?, ?)", new)
            moved = "UPDATE jobs SET settings = ?, model = ?, state = 'pending', worker = NULL"
            db.execute(f"{moved} WHERE {ours}", (number, model, *row))
            pending = f"{moved} WHERE state = 'pending' AND settings = ?"
            db.execute(pending, (number, model, *before))
        return True

    def failed_to_load(self, job: ClaimedJob, error: WancliError) -> int:
        """Note that a job's model cannot be loaded: all that wait for it fail; returns how many."""
        self.failed(job, error)
        with self._ledger._transaction() as db:
            return db.execute(
                "UPDATE jobs SET state = 'failed', ended = ?, error = ? "
                "WHERE state = 'pending' AND model = ?",
                (time.time(), json.dumps(error_json(error)), job.model),
            ).rowcount

    def _change(
        self, job: ClaimedJob, change: str, values: Sequence[Any], *,
        of: Sequence[str] = (RUNNING,), also: str = "",
    ) -> bool:  # fmt: skip
        """Change the row of a job; False if it is no longer this worker's."""
        marks = ",".join("?" * len(of))
        ours = f"WHERE number = ? AND worker = ? AND attempt = ? AND state IN ({marks}) {also}"
        with self._ledger._transaction() as db:
            update = f"UPDATE jobs SET {change} {ours}"
            row = (job.number, self.name, job.attempt)
            return db.execute(update, (*values, *row, *of)).rowcount > 0


def died_error() -> RunError:
    """The error of a job that workers die in."""
    return RunError(
        f"the process that made it was killed {MOST_DEATHS} times.",
        hint="less memory: a smaller `size`, `offload group`; the same command tries again",
    )


def _claimed(db: sqlite3.Connection, number: int) -> ClaimedJob:
    number, attempt, model, command, values, prompt, seed, output, files = db.execute(
        _CLAIMED, (number,)
    ).fetchone()
    return ClaimedJob(
        number, attempt, model, command, json.loads(values), prompt, seed, Path(output),
        json.loads(files or "{}"),
    )  # fmt: skip


# A model that nobody works on before one that somebody does: each is loaded as rarely as possible.
_NEXT = """
SELECT number FROM jobs WHERE state = 'pending'
ORDER BY model IN (SELECT model FROM jobs WHERE state = 'running'), model, number LIMIT 1
"""
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
            f"{path} is the ledger of another batch, or of this one before its file, WANCLI_MODEL "
            "or WANCLI_PRESET changed.",
            hint=f"another `ledger`; {batch_command('status', path)}",
        )
    return ledger


def open_ledger(path: Path) -> Ledger:
    """Open an existing ledger, or the only one in a folder. Raises InputError, UsageError."""
    path = _only_one(path) if path.is_dir() else path
    if not path.exists():
        raise InputError(f"ledger '{path}' not found.", hint="the folder of the batch's outputs")
    return Ledger(path, connect(path))


def _only_one(folder: Path) -> Path:
    """The ledger in a folder. Raises InputError, UsageError."""
    paths = sorted(folder.glob(f"*{SUFFIX}"))
    if not paths:
        raise InputError(f"no ledger in '{folder}'.", hint="the folder of the batch's outputs")
    if len(paths) > 1:
        raise UsageError(f"'{folder}' has {len(paths)} ledgers.", hint=f"one of them: {paths[0]}")
    return paths[0]


def _lock_name(path: Path, worker: str) -> str:
    return f"{path.name}.{worker}"


def _check_lock(lock: FolderLock, path: Path) -> None:
    """Raise UsageError where locks do not work: then nobody knows who is alive."""
    if not lock.works:
        raise UsageError(
            f"{path.parent} has no working locks, which a ledger needs.",
            hint="a `ledger` in a folder of your own, on a local disk",
        )


def _is_alive(path: Path, worker: str) -> bool:
    """Whether a worker holds its lock."""
    lock = FolderLock(path.parent)
    try:
        lock.acquire(_lock_name(path, worker))
        _check_lock(lock, path)
    except NameLocked:
        return True
    finally:
        lock.release()
    return False
