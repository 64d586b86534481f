"""Who takes jobs from a ledger, and notes in it how they go."""

import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wancli.errors import OutputError, RunError, WancliError
from wancli.records.ledger import (
    CANCELLED,
    DONE,
    FAILED,
    RUNNING,
    SKIPPED,
    ClaimedJob,
    Ledger,
    claimed_job,
    lock_worker,
)
from wancli.records.ledger_file import batch_command
from wancli.records.record import error_json

# A model that nobody works on before one that somebody does: each is loaded as rarely as possible.
_NEXT = """
SELECT number FROM jobs WHERE state = 'pending'
ORDER BY model IN (SELECT model FROM jobs WHERE state = 'running'), model, number LIMIT 1
"""


class JobCancelled(RunError):
    """A job that runs was cancelled, or is another worker's now: it stops."""


class LedgerWorker:
    """One who takes jobs from a ledger; alive until `close`, or the end of the process."""

    def __init__(self, ledger: Ledger) -> None:
        self.name = secrets.token_hex(8)
        self._ledger, self._model = ledger, -1
        self._lock = lock_worker(ledger.path, self.name)
        ledger.own_workers.add(self.name)

    def close(self) -> None:
        """Give back what is claimed, and end."""
        try:
            with self._ledger.transaction() as db:
                db.execute(
                    "UPDATE jobs SET state = 'pending', worker = NULL "
                    "WHERE state = 'running' AND worker = ?",
                    (self.name,),
                )
        finally:  # without which others would wait for its jobs
            self._ledger.own_workers.discard(self.name)
            self._lock.release()

    def claim(self) -> ClaimedJob | None:
        """The next job, of the same model while there is one; None if none waits.

        Raises OutputError if the ledger is gone: what is written to it then is lost.
        """
        self._ledger.check_there()
        with self._ledger.transaction() as db:
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
            job = claimed_job(db, number)
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
        with self._ledger.transaction() as db:
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
        with self._ledger.transaction() as db:
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
        with self._ledger.transaction() as db:
            update = f"UPDATE jobs SET {change} {ours}"
            row = (job.number, self.name, job.attempt)
            return db.execute(update, (*values, *row, *of)).rowcount > 0
