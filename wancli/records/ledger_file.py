"""The file of a ledger: made whole, opened with checks, on a disk where SQLite is safe.

SQLite's own locks are of the kind that a process loses when it closes any descriptor of the file:
nothing here may open a ledger but SQLite.
"""

import json
import os
import re
import shlex
import sqlite3
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wancli.errors import InputError, OutputError, UsageError
from wancli.utils.files import part_name, place, remove_parts
from wancli.utils.locks import FolderLock, NameLocked
from wancli.utils.reading import kind_of

_SCHEMA = 2  # of the tables
_APPLICATION = 0x57414E42  # "WANB": SQLite's mark of whose file it is
_WAIT = 60.0  # seconds for another process's write
_AGAIN = 0.05  # seconds between looks at a lock
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
    output TEXT NOT NULL, files TEXT,
    state TEXT NOT NULL DEFAULT 'pending', attempt INTEGER NOT NULL DEFAULT 0,
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
    """A job with its final names. `settings` is the index of its LedgerSettings.

    `files` are those besides the video, by the setting that asks for them.
    """

    line: int
    settings: int
    prompt: str | None
    seed: int | None
    output: str
    id: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)


def write_ledger(
    path: Path, digest: str, settings: Iterable[LedgerSettings], jobs: Iterable[LedgerJob], *,
    version: str,
) -> None:  # fmt: skip
    """Write a new ledger, unless another process is faster. Raises UsageError, OutputError.

    The file appears whole: of two processes that begin together, one's is used. Besides, SQLite
    does not wait for others while it turns WAL on.
    """
    check_local(path.parent)
    part = part_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path) as alone:
            if os.path.lexists(path):
                return
            with sqlite_errors(path), closing(sqlite3.connect(part, isolation_level=None)) as db:
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
        with suppress(OSError):  # must not hide the error that led here
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


def connect(path: Path) -> sqlite3.Connection:
    """Open a ledger's file, which is a regular one. Raises UsageError, InputError, OutputError."""
    check_local(path.parent)
    kind = path.lstat().st_mode
    if not stat.S_ISREG(kind):
        raise UsageError(f"{path} is {kind_of(kind)}, not a ledger.", hint="another `ledger`")
    uri = f"{path.absolute().as_uri()}?mode=rw"
    with sqlite_errors(path):
        db = sqlite3.connect(uri, uri=True, timeout=_WAIT, isolation_level=None)
        try:
            db.execute("PRAGMA synchronous = NORMAL")  # a killed process loses nothing
            _check_tables(path, db)
        except BaseException:
            db.close()
            raise
    return db


def _check_tables(path: Path, db: sqlite3.Connection) -> None:
    """Raise UsageError for another program's database, and for the ledger of another version."""
    (owner,) = db.execute("PRAGMA application_id").fetchone()
    (schema,) = db.execute("PRAGMA user_version").fetchone()
    if owner != _APPLICATION:
        raise UsageError(f"{path} is another program's database.", hint="another `ledger`")
    known = {text.strip() for text in _TABLES.split(";")}
    tables = db.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL").fetchall()
    if schema == _SCHEMA and {text.strip() for (text,) in tables} != known - {""}:
        raise damaged(str(path))
    if schema != _SCHEMA:
        (version,) = db.execute("SELECT version FROM batch").fetchone()
        raise UsageError(
            f"{path} is the ledger of wancli {version}, with tables {schema}.",
            hint="another `ledger`, or that version",
        )


def _fill(
    db: sqlite3.Connection, digest: str, settings: Iterable[LedgerSettings],
    jobs: Iterable[LedgerJob], *, version: str,
) -> None:  # fmt: skip
    for statement in filter(str.strip, _TABLES.split(";")):
        db.execute(statement)
    db.execute(f"PRAGMA application_id = {_APPLICATION}")
    db.execute(f"PRAGMA user_version = {_SCHEMA}")
    db.execute("INSERT INTO batch VALUES (?, ?, ?)", (digest, version, time.time()))
    shared = list(settings)
    db.executemany(
        "INSERT INTO settings VALUES (?, ?, ?, ?)",
        ((n, s.model, s.command, json.dumps(s.values)) for n, s in enumerate(shared)),
    )
    db.executemany(
        "INSERT INTO jobs (line, id, model, settings, prompt, seed, output, files) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            (
                j.line,
                j.id,
                shared[j.settings].model,
                j.settings,
                j.prompt,
                j.seed,
                j.output,
                json.dumps(j.files) if j.files else None,
            )
            for j in jobs
        ),
    )


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
        text = os.fsdecode(Path("/proc/self/mounts").read_bytes()) if mounts is None else mounts
    except OSError:
        return ""
    best, kind = -1, ""
    for line in filter(None, text.split("\n")):
        fields = line.split(" ")
        place = Path(re.sub(r"\\([0-7]{3})", lambda space: chr(int(space[1], 8)), fields[1]))
        if folder.is_relative_to(place) and len(place.parts) >= best:
            best, kind = len(place.parts), fields[2]
    return kind


def batch_command(name: str, ledger: Path, *flags: str) -> str:
    """`wancli batch NAME LEDGER`, as it is typed into a shell."""
    return shlex.join(["wancli", "batch", name, str(ledger), *flags])


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
def sqlite_errors(path: Path) -> Iterator[None]:
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
        raise InputError(
            f"{path} is not a ledger: {error}.", hint="a ledger is NAME.ledger beside the videos"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise damaged(str(path)) from None
