"""The status of a batch: what runs, why jobs failed, and how long the rest takes."""

import sqlite3
import time

import pytest

from tests.records.test_ledger import claim, fresh, make
from wancli.errors import RunError
from wancli.records.batch_status import read_status
from wancli.records.ledger_worker import LedgerWorker


def change(ledger, update):
    with sqlite3.connect(ledger.path) as db:
        db.execute(f"UPDATE jobs SET {update}")
    db.close()


def test_the_rest_takes_the_median_of_each_setting_and_is_shared_by_the_workers(tmp_path):
    with fresh(tmp_path, 14) as ledger, fresh(tmp_path, 14) as same:
        first, second = LedgerWorker(ledger), LedgerWorker(same)
        for _ in range(3):
            for worker, job in [(worker, claim(worker)) for worker in (first, second)]:
                worker.done(job, make(job))
        change(ledger, "began = 0, ended = 10 * (1 + model) WHERE state = 'done'")
        change(ledger, "ended = 9e9 WHERE number = 1")  # the clock was set forward, and back
        change(ledger, "began = 9e9 WHERE number = 2")
        assert read_status(ledger).left_s is None  # nobody works
        assert claim(first).model == 0
        assert claim(second).model == 1
        status = read_status(ledger)
        assert status.each_s == 20
        jobs = 2 * 20 + 3 * 10 + 3 * 20  # the two that have begun, then the others by setting
        assert status.left_s == pytest.approx(jobs / 2, abs=1)


def test_running_jobs_have_a_worker_that_is_alive_or_has_ended(tmp_path):
    with fresh(tmp_path) as ledger:
        worker = LedgerWorker(ledger)
        claim(worker)
        change(ledger, f"began = {time.time() - 90}, heartbeat = {time.time() + 1e6}")
        (job,) = read_status(ledger).running
        assert (job.line, job.attempt, job.alive) == (1, 1, True)
        assert 90 <= job.seconds < 100
        assert job.quiet_s == 0  # the clock was set back since
        worker._lock.release()
        assert not read_status(ledger).running[0].alive


def test_failures_are_told_once_for_each_reason(tmp_path):
    with fresh(tmp_path) as ledger:
        worker = LedgerWorker(ledger)
        for word in ("one", "other", "one"):
            worker.failed(claim(worker), RunError(word, hint=f"for {word}"))
        reasons = [(f.message, f.hint, f.lines) for f in read_status(ledger).failed]
        assert reasons == [("one", "for one", [1, 5]), ("other", "for other", [3])]
