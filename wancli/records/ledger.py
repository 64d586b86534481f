"""The ledger of a batch: which job waits, runs, is done or has failed, in one SQLite file.

It holds the jobs themselves, so that whoever opens it can work on them. A worker holds a lock
(`utils.locks`), which the kernel releases however the worker ends; the times in the ledger are for
people, and no clock decides who is alive. So a ledger is used from one machine: SQLite's WAL needs
that, and a network file system is refused.

SQLite's own locks are of the kind that a process loses when it closes any descriptor of the file:
nothing here may open the ledger but SQLite.
"""

import json
import os
import secrets
import socket
import sqlite3
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from wancli.errors import InputError, OutputError, RunError, UsageError, WancliError
from wancli.records.record import error_json
from wancli.utils.files import kind_of, part_name, place, remove_parts
from wancli.utils.locks import FolderLock, NameLocked

SCHEMA = 1  # of the tables
_APPLICATION = 0x57414E42  # "WANB": SQLite's mark of whose file it is
_WAIT = 60.0  # seconds for another process's write
MOST_DEATHS = 3  # of workers in one job: it is probably what they die of
_AGAIN = 0.05  # seconds between looks at a lock
PENDING, RUNNING, DONE, FAILED, SKIPPED, CANCELLED = STATES = (
    "pending", "running", "done", "failed", "skipped", "cancelled",
)  # fmt: skip
SUFFIX = ".ledger"
# Without the shared memory or the locks that SQLite needs.
_NETWORK = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "lustre", "ceph", "beegfs", "gpfs",
    "fuse.sshfs", "fuse.glusterfs", "fuse.s3fs", "fuse.rclone", "fuse.gcsfuse",
}  # fmt: skip
_TABLES = """
CREATE TABLE batch (digest TEXT NOT NULL, version TEXT NOT NULL, made REAL NOT NULL);
CREATE TABLE settings (
    number INTEGER PRIMARY KEY, model INTEGER NOT NULL, command TEXT NOT NULL, json TEXT NOT NULL
);
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY, line INTEGER NOT NULL, id TEXT, model INTEGER NOT NULL,
    settings INTEGER NOT NULL REFERENCES settings, prompt TEXT, seed INTEGER,
    output TEXT NOT NULL, state TEXT NOT NULL DEFAULT 'pending', attempt INTEGER NOT NULL DEFAULT 0,
    deaths INTEGER NOT NULL DEFAULT 0, failures INTEGER NOT NULL DEFAULT 0,
    worker TEXT, host TEXT, pid INTEGER, heartbeat REAL, began REAL, ended REAL,
    bytes INTEGER, error TEXT, record TEXT
);
CREATE INDEX by_state ON jobs (state, model, number);
"""


@dataclass(frozen=True)
class LedgerSettings:
    """Settings of jobs; those with the same `model` number run on one loaded model."""

    model: int
    command: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LedgerJob:
    """A job with its final name. `settings` is the index of its LedgerSettings."""

    line: int
    settings: int
    prompt: str | None
    seed: int | None
    output: str
    id: str | None = None


@dataclass(frozen=True)
class ClaimedJob:
    """A job that a worker has claimed. `attempt` counts from 1."""

    number: int
    attempt: int
    model: int
    command: str
    values: Mapping[str, Any]
    prompt: str | None
    seed: int | None
    output: Path


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
        with _sqlite(self.path):
            return str(self._db.execute("SELECT digest FROM batch").fetchone()[0])

    def counts(self) -> dict[str, int]:
        """The number of jobs in each state."""
        with _sqlite(self.path):
            rows = self._db.execute("SELECT state, count(*) FROM jobs GROUP BY state")
            return dict.fromkeys(STATES, 0) | dict(rows.fetchall())

    def rows(self, *states: str) -> Iterator[dict[str, Any]]:
        """Jobs in some states, or all, in the order of the file."""
        marks = ",".join("?" * len(states))
        where = f"WHERE state IN ({marks})" if states else ""
        with _sqlite(self.path):
            cursor = self._db.execute(f"SELECT * FROM jobs {where} ORDER BY number", states)
            names = [column[0] for column in cursor.description]
            for row in cursor:
                yield dict(zip(names, row, strict=True))

    def row(self, number: int) -> dict[str, Any]:
        """One job."""
        with _sqlite(self.path):
            cursor = self._db.execute("SELECT * FROM jobs WHERE number = ?", (number,))
            names = [column[0] for column in cursor.description]
            return dict(zip(names, cursor.fetchone(), strict=True))

    def numbers(self, *states: str) -> list[int]:
        """Numbers of the jobs in some states, or of all."""
        return [row["number"] for row in self.rows(*states)]

    def retry(self, numbers: Iterable[int]) -> int:
        """Let jobs wait again that have ended; returns how many."""
        return self._move(
            numbers,
            "state = 'pending', worker = NULL, error = NULL, ended = NULL, "
            "deaths = 0, failures = 0",
            of=(DONE, SKIPPED, FAILED, CANCELLED),
        )

    def cancel(self, numbers: Iterable[int]) -> int:
        """Cancel jobs that wait or run; returns how many.

        A worker learns of it at its next `beat`; a job that is done before that is done.
        """
        now = time.time()
        return self._move(numbers, f"state = 'cancelled', ended = {now}", of=(PENDING, RUNNING))

    def _move(self, numbers: Iterable[int], change: str, *, of: Sequence[str]) -> int:
        """Change the rows of jobs in some states; returns how many."""
        marks = ",".join("?" * len(of))
        update = f"UPDATE jobs SET {change} WHERE number = ? AND state IN ({marks})"
        with self._transaction() as db:
            return db.executemany(update, ((number, *of) for number in numbers)).rowcount

    def settings(self) -> list[LedgerSettings]:
        """Settings of jobs; the index is the `settings` of a row."""
        with _sqlite(self.path):
            rows = self._db.execute("SELECT model, command, json FROM settings ORDER BY number")
            return [LedgerSettings(model, name, json.loads(text)) for model, name, text in rows]

    def waiting(self) -> dict[int, int]:
        """The number of jobs that wait, by the index of their settings."""
        with _sqlite(self.path):
            query = "SELECT settings, count(*) FROM jobs WHERE state = 'pending' GROUP BY settings"
            return dict(self._db.execute(query).fetchall())

    def seconds(self, most: int = 1000) -> list[tuple[int, float]]:
        """(index of the settings, seconds) of jobs that are done, at most so many.

        Jobs during which the clock was set back are left out.
        """
        with _sqlite(self.path):
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
        with _sqlite(self.path):
            rows = self._db.execute(query, (job.model, job.number, most)).fetchall()
        return list(dict.fromkeys(row[0] for row in rows))

    def sizes(self) -> tuple[int, int]:
        """The number of finished videos, and their bytes."""
        with _sqlite(self.path):
            query = "SELECT count(bytes), coalesce(sum(bytes), 0) FROM jobs WHERE state = 'done'"
            count, size = self._db.execute(query).fetchone()
        return count, size

    def is_alive(self, worker: str) -> bool:
        """Whether the worker of a row is still there."""
        return _is_alive(self.path, worker)

    def is_running(self) -> bool:
        """Whether somebody works on a job."""
        with _sqlite(self.path):
            query = "SELECT 1 FROM jobs WHERE state = 'running' LIMIT 1"
            return self._db.execute(query).fetchone() is not None

    def free_abandoned(self) -> list[ClaimedJob]:
        """Let the jobs of workers that have died wait again.

        Returns those that `MOST_DEATHS` workers have died in: they have failed, by `died_error`.
        """
        with _sqlite(self.path):
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
        with _sqlite(self.path):
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
        with self._ledger._transaction() as db:
            db.execute(
                "UPDATE jobs SET state = 'pending', worker = NULL "
                "WHERE state = 'running' AND worker = ?",
                (self.name,),
            )
        self._ledger._own.discard(self.name)
        self._lock.release()

    def claim(self) -> ClaimedJob | None:
        """The next job, of the same model while there is one; None if none waits.

        Raises OutputError if the ledger is gone: what is written to it then is lost.
        """
        self._ledger.check_there()
        with self._ledger._transaction() as db:
            first = "SELECT number FROM jobs WHERE state = 'pending' AND model = ? LIMIT 1"
            found = db.execute(first, (self._model,)).fetchone()
            found = found or db.execute(_NEXT).fetchone()
            if found is None:
                return None
            now = time.time()
            db.execute(
                "UPDATE jobs SET state = 'running', attempt = attempt + 1, worker = ?, host = ?, "
                "pid = ?, began = ?, heartbeat = ?, ended = NULL, error = NULL WHERE number = ?",
                (self.name, socket.gethostname(), os.getpid(), now, now, found[0]),
            )
            job = _claimed(db, found[0])
        self._model = job.model
        return job

    def beat(self, job: ClaimedJob) -> None:
        """Note that the job is being worked on. Raises JobCancelled."""
        if not self._change(job, "heartbeat = ?", (time.time(),)):
            hint = f"wancli batch retry {self._ledger.path} --cancelled"
            raise JobCancelled("the job was cancelled.", hint=hint)

    def done(self, job: ClaimedJob, record: Mapping[str, Any], *, kept: bool = False) -> None:
        """Note that the video is whole under its final name; `kept`: it was there before.

        Raises OutputError if no file has that name.
        """
        try:
            size = job.output.stat().st_size
        except OSError as error:
            raise OutputError(
                f"{job.output} is not there: {error.strerror}.", hint="wancli batch retry"
            ) from None
        state, text = SKIPPED if kept else DONE, json.dumps(record)
        values = (state, time.time(), size, text)
        change = "state = ?, ended = ?, bytes = ?, record = ?"
        self._change(job, change, values, of=(RUNNING, CANCELLED))

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
    number, attempt, model, command, values, prompt, seed, output = db.execute(
        _CLAIMED, (number,)
    ).fetchone()
    path = Path(output)
    return ClaimedJob(number, attempt, model, command, json.loads(values), prompt, seed, path)


# A model that nobody works on before one that somebody does: each is loaded as rarely as possible.
_NEXT = """
SELECT number FROM jobs WHERE state = 'pending'
ORDER BY model IN (SELECT model FROM jobs WHERE state = 'running'), model, number LIMIT 1
"""
_CLAIMED = """
SELECT jobs.number, attempt, jobs.model, command, json, prompt, seed, output
FROM jobs JOIN settings ON settings.number = jobs.settings WHERE jobs.number = ?
"""


def create_ledger(
    path: Path, digest: str, settings: Iterable[LedgerSettings], jobs: Iterable[LedgerJob], *,
    version: str,
) -> Ledger:  # fmt: skip
    """Write a ledger, or open the one of the same batch. Raises UsageError, OutputError.

    The file appears whole: of two processes that begin together, one's is used. Besides, SQLite
    does not wait for others while it turns WAL on.
    """
    check_local(path.parent)
    if not os.path.lexists(path):
        _write(path, digest, settings, jobs, version=version)
    return open_batch(path, digest)


def open_batch(path: Path, digest: str) -> Ledger:
    """Open the ledger of a batch. Raises UsageError for that of another, InputError."""
    ledger = open_ledger(path)
    if ledger.digest != digest:
        ledger.close()
        raise UsageError(
            f"{path} is the ledger of another batch, or of this one before its file changed.",
            hint=f"another `ledger`; wancli batch status {path}",
        )
    return ledger


def open_ledger(path: Path) -> Ledger:
    """Open an existing ledger, or the only one in a folder. Raises InputError, UsageError."""
    path = _only_one(path) if path.is_dir() else path
    if not path.exists():
        raise InputError(f"ledger '{path}' not found.", hint="the folder of the batch's outputs")
    check_local(path.parent)
    ledger = Ledger(path, _connect(path))
    try:
        _check(ledger)
    except BaseException:
        ledger.close()
        raise
    return ledger


def _only_one(folder: Path) -> Path:
    """The ledger in a folder. Raises InputError, UsageError."""
    paths = sorted(folder.glob(f"*{SUFFIX}"))
    if not paths:
        raise InputError(f"no ledger in '{folder}'.", hint="the folder of the batch's outputs")
    if len(paths) > 1:
        raise UsageError(f"'{folder}' has {len(paths)} ledgers.", hint=f"one of them: {paths[0]}")
    return paths[0]


def _write(
    path: Path, digest: str, settings: Iterable[LedgerSettings], jobs: Iterable[LedgerJob], *,
    version: str,
) -> None:  # fmt: skip
    """Write a new ledger, unless another process is faster. Raises OutputError."""
    part = part_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path) as alone:
            if os.path.lexists(path):
                return
            with _sqlite(path), closing(sqlite3.connect(part, isolation_level=None)) as db:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("BEGIN")
                _fill(db, digest, settings, jobs, version=version)
                db.execute("COMMIT")
            if alone:  # of a deleted ledger: SQLite would take its changes for ours
                _remove_with(path)
            with suppress(FileExistsError):
                place(part, path, overwrite=False)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror}.", hint="another folder for the `ledger`"
        ) from None
    finally:
        part.unlink(missing_ok=True)
        _remove_with(part)


def _remove_with(path: Path) -> None:
    """Remove the files that SQLite keeps beside its own."""
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


@contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Lock the name of a new ledger, after another process that writes it.

    Removes what killed processes left of it. False where locks do not work, as workers will say.
    """
    lock = FolderLock(path.parent)
    while True:
        try:
            lock.acquire(path.name)
            break
        except NameLocked:
            lock.release()
            time.sleep(_AGAIN)
            lock = FolderLock(path.parent)
    try:
        if lock.works:
            remove_parts(path.parent, {path.name})
        yield lock.works
    finally:
        lock.release()


def check_local(folder: Path, mounts: str | None = None) -> None:
    """Raise UsageError for a folder on a network file system; `mounts` as in /proc/self/mounts."""
    kind = _file_system(Path(os.path.realpath(folder)), mounts)
    if kind in _NETWORK:
        raise UsageError(
            f"{folder} is on a network file system ({kind}), where a ledger is not safe.",
            hint="a `ledger` on a local disk; the videos may stay there",
        )


def _file_system(folder: Path, mounts: str | None) -> str:
    """Type of the file system that holds a folder; "" if unknown."""
    try:
        text = Path("/proc/self/mounts").read_text() if mounts is None else mounts
    except OSError:
        return ""
    best, kind = -1, ""
    for line in text.splitlines():
        fields = line.split()
        place = Path(fields[1].encode().decode("unicode_escape"))  # a space is \040
        if folder.is_relative_to(place) and len(place.parts) >= best:
            best, kind = len(place.parts), fields[2]
    return kind


def _connect(path: Path) -> sqlite3.Connection:
    """Connect to a regular file. Raises UsageError, OutputError."""
    kind = path.lstat().st_mode
    if not stat.S_ISREG(kind):
        raise UsageError(f"{path} is {kind_of(kind)}, not a ledger.", hint="another `ledger`")
    with _sqlite(path):
        db = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=_WAIT, isolation_level=None
        )
        db.execute("PRAGMA synchronous = NORMAL")  # a killed process loses nothing
        return db


def _fill(
    db: sqlite3.Connection, digest: str, settings: Iterable[LedgerSettings],
    jobs: Iterable[LedgerJob], *, version: str,
) -> None:  # fmt: skip
    for statement in filter(str.strip, _TABLES.split(";")):
        db.execute(statement)
    db.execute(f"PRAGMA application_id = {_APPLICATION}")
    db.execute(f"PRAGMA user_version = {SCHEMA}")
    db.execute("INSERT INTO batch VALUES (?, ?, ?)", (digest, version, time.time()))
    shared = list(settings)
    db.executemany(
        "INSERT INTO settings VALUES (?, ?, ?, ?)",
        ((n, s.model, s.command, json.dumps(s.values)) for n, s in enumerate(shared)),
    )
    db.executemany(
        "INSERT INTO jobs (line, id, model, settings, prompt, seed, output) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            (j.line, j.id, shared[j.settings].model, j.settings, j.prompt, j.seed, j.output)
            for j in jobs
        ),
    )


def _check(ledger: Ledger) -> None:
    """Raise UsageError for another program's database, and for the ledger of another version."""
    path, db = ledger.path, ledger._db
    with _sqlite(path):
        (owner,) = db.execute("PRAGMA application_id").fetchone()
        (schema,) = db.execute("PRAGMA user_version").fetchone()
        if owner != _APPLICATION:
            raise UsageError(f"{path} is another program's database.", hint="another `ledger`")
        known = {text.strip() for text in _TABLES.split(";")}
        tables = db.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL").fetchall()
        if schema == SCHEMA and {text.strip() for (text,) in tables} != known - {""}:
            raise damaged(str(path))
        if schema != SCHEMA:
            (version,) = db.execute("SELECT version FROM batch").fetchone()
            raise UsageError(
                f"{path} is the ledger of wancli {version}, with tables {schema}.",
                hint="another `ledger`, or that version",
            )


def damaged(what: str) -> InputError:
    """The error of a ledger in which something cannot be read."""
    hint = "another `ledger`, with `skip_existing`: finished videos are kept"
    return InputError(f"the ledger is damaged: {what} cannot be read.", hint=hint)


def parse_column(row: Mapping[str, Any], name: str) -> Any:
    """A column of a row that has JSON, or nothing. Raises InputError."""
    try:
        return json.loads(row[name] or "null")
    except ValueError:
        raise damaged(f"the {name} of line {row['line']}") from None


@contextmanager
def _sqlite(path: Path) -> Iterator[None]:
    """Turn errors of SQLite into ours. Raises OutputError, InputError."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if not hasattr(error, "sqlite_errorcode"):  # Python's: text that is not UTF-8
            raise damaged(str(path)) from None
        raise OutputError(
            f"cannot use {path}: {error}.", hint="free some space, or another `ledger`"
        ) from None
    except sqlite3.DatabaseError as error:
        raise InputError(f"{path} is not a ledger: {error}.", hint="another `ledger`") from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise damaged(str(path)) from None


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
