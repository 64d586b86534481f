"""The ledger: no job is lost, none is made twice, whatever happens to the workers."""

import fcntl
import os
import random
import signal
import sqlite3
import time

import pytest

from wancli.errors import OutputError, RunError, UsageError
from wancli.records.ledger import MOST_DEATHS, STATES, ClaimedJob, create_ledger
from wancli.records.ledger_file import LedgerJob, LedgerSettings
from wancli.records.ledger_worker import JobCancelled, LedgerWorker

SETTINGS = [LedgerSettings(model, "generate", {"steps": model}) for model in (0, 1)]


def fresh(folder, count=6, digest="d"):
    jobs = [
        LedgerJob(n + 1, n % 2, f"prompt {n}", n, str(folder / f"{n}.mp4")) for n in range(count)
    ]
    return create_ledger(folder / "b.ledger", digest, SETTINGS, jobs, version="1")


def claim(worker: LedgerWorker) -> ClaimedJob:
    job = worker.claim()
    assert job
    return job


def make(job):
    job.output.write_bytes(b"video")
    return {"id": str(job.number)}


def test_a_worker_stays_on_its_model(tmp_path):
    with fresh(tmp_path) as ledger:
        worker = LedgerWorker(ledger)
        jobs = [claim(worker) for _ in range(6)]
        assert [job.model for job in jobs] == [0, 0, 0, 1, 1, 1]
        assert [job.values["steps"] for job in jobs] == [0, 0, 0, 1, 1, 1]
        assert worker.claim() is None
        worker.close()


def test_the_next_prompts_are_those_of_jobs_with_the_same_settings(tmp_path):
    with fresh(tmp_path) as ledger:
        worker = LedgerWorker(ledger)
        job = claim(worker)
        assert ledger.next_prompts(job, most=9) == ["prompt 2", "prompt 4"]
        assert ledger.next_prompts(job, most=1) == ["prompt 2"]
        worker.close()


def test_a_second_worker_begins_with_another_model(tmp_path):
    with fresh(tmp_path) as ledger, fresh(tmp_path) as same:
        first, second = LedgerWorker(ledger), LedgerWorker(same)
        assert [claim(first).model, claim(second).model] == [0, 1]


def test_a_job_is_done_only_with_a_file(tmp_path):
    with fresh(tmp_path) as ledger:
        worker = LedgerWorker(ledger)
        job = claim(worker)
        with pytest.raises(OutputError, match="not there"):
            worker.done(job, {})
        assert ledger.counts()["running"] == 1
        worker.done(job, make(job))
        (row,) = ledger.rows("done")
        assert (row["bytes"], row["record"], row["attempt"]) == (5, '{"id": "1"}', 1)


def test_a_failure_keeps_its_error_until_it_is_tried_again(tmp_path):
    with fresh(tmp_path) as ledger:
        worker = LedgerWorker(ledger)
        worker.failed(claim(worker), RunError("no.", hint="less"))
        (row,) = ledger.rows("failed")
        assert '"hint": "less"' in row["error"]
        assert ledger.retry([row["number"]]) == 1
        assert ledger.counts() == dict.fromkeys(STATES, 0) | {"pending": 6}


def test_only_jobs_that_have_ended_wait_again_and_only_others_are_cancelled(tmp_path):
    with fresh(tmp_path) as ledger:
        worker = LedgerWorker(ledger)
        done, running = claim(worker), claim(worker)
        worker.done(done, make(done))
        numbers = ledger.numbers()
        assert ledger.cancel(numbers) == 5
        assert ledger.retry(numbers) == 6
        assert ledger.cancel([running.number]) == 1
        assert ledger.counts() == dict.fromkeys(STATES, 0) | {"pending": 5, "cancelled": 1}


def test_a_worker_learns_that_its_job_was_cancelled_unless_it_is_done(tmp_path):
    with fresh(tmp_path) as ledger:
        worker = LedgerWorker(ledger)
        early, late = claim(worker), claim(worker)
        worker.beat(early)
        ledger.cancel([early.number, late.number])
        with pytest.raises(JobCancelled):
            worker.beat(early)
        worker.failed(early, RunError("as it was cancelled.", hint=""))
        worker.done(late, make(late))
        counts = ledger.counts()
        assert (counts["cancelled"], counts["done"], counts["failed"]) == (1, 1, 0)


def test_a_cancelled_job_that_is_retried_is_its_workers_until_that_has_stopped(tmp_path):
    with fresh(tmp_path, 1) as ledger:
        worker, other = LedgerWorker(ledger), LedgerWorker(ledger)
        job = claim(worker)
        ledger.cancel([job.number])
        assert ledger.retry([job.number]) == 1
        assert other.claim() is None
        worker.beat(job)  # it goes on
        ledger.cancel([job.number])
        with pytest.raises(JobCancelled):
            worker.beat(job)
        ledger.retry([job.number])
        assert other.claim() is None
        worker.stopped(job)
        assert claim(other).number == job.number


def test_a_ledger_that_is_gone_takes_no_more_jobs(tmp_path):
    with fresh(tmp_path) as ledger:
        worker = LedgerWorker(ledger)
        claim(worker)
        ledger.path.unlink()
        with pytest.raises(OutputError, match="was deleted or replaced"):
            worker.claim()
        with fresh(tmp_path), pytest.raises(OutputError, match="was deleted or replaced"):
            worker.claim()


def test_a_closed_worker_gives_its_job_back_and_changes_it_no_more(tmp_path):
    with fresh(tmp_path) as ledger:
        late, worker = LedgerWorker(ledger), LedgerWorker(ledger)
        job = claim(late)
        late.close()
        again = claim(worker)
        assert (again.number, again.attempt) == (job.number, 2)
        late.failed(job, RunError("late.", hint=""))
        assert ledger.counts()["failed"] == 0


def test_looking_for_the_dead_asks_nobody_of_this_process(tmp_path, monkeypatch):
    """As the driver of a cluster has a worker for each of a thousand actors."""
    looked_for = []
    monkeypatch.setattr(
        "wancli.records.ledger._is_alive", lambda _, worker: looked_for.append(worker)
    )
    with fresh(tmp_path) as ledger, fresh(tmp_path) as same:
        ours, other = LedgerWorker(ledger), LedgerWorker(same)
        claim(ours)
        claim(other)
        ledger.free_abandoned()
        assert looked_for == [other.name]


def test_a_living_worker_keeps_its_job_however_old_its_heartbeat(tmp_path):
    with fresh(tmp_path) as ledger:
        worker = LedgerWorker(ledger)
        claim(worker)
        with sqlite3.connect(ledger.path) as db:
            db.execute("UPDATE jobs SET heartbeat = 0")
        db.close()
        assert ledger.free_abandoned() == []


def test_a_job_that_its_workers_die_in_fails_until_it_is_tried_again(tmp_path):
    with fresh(tmp_path, 1) as ledger:
        for _ in range(MOST_DEATHS):
            assert ledger.counts()["failed"] == 0
            worker = LedgerWorker(ledger)
            job = claim(worker)
            failed = ledger.free(worker.name)
        assert [one.number for one in failed] == [job.number]
        (row,) = ledger.rows("failed")
        assert "was killed 3 times" in row["error"]
        ledger.retry(ledger.numbers("failed"))
        assert ledger.free(claim_and_die(ledger)) == []


def claim_and_die(ledger):
    worker = LedgerWorker(ledger)
    claim(worker)
    return worker.name


def test_the_same_batch_opens_its_ledger_and_another_is_refused(tmp_path):
    with fresh(tmp_path) as ledger:
        worker = LedgerWorker(ledger)
        job = claim(worker)
        worker.done(job, make(job))
    with fresh(tmp_path) as ledger:
        assert ledger.counts()["done"] == 1
    (tmp_path / "b-2.ledger").touch()
    with pytest.raises(UsageError, match="of another batch") as caught:
        fresh(tmp_path, digest="e")
    assert caught.value.hint.startswith(f"`ledger {tmp_path / 'b-3.ledger'}` `skip_existing`")


def test_a_full_disk_is_an_output_error(tmp_path):
    with fresh(tmp_path) as ledger:
        (pages,) = ledger._db.execute("PRAGMA page_count").fetchone()
        ledger._db.execute(f"PRAGMA max_page_count = {pages}")
        worker = LedgerWorker(ledger)
        job = claim(worker)
        make(job)
        with pytest.raises(OutputError, match="full"):
            worker.done(job, {"x": "y" * 100_000})
        assert ledger.counts()["running"] == 1


def work(folder, seed):
    """Work like a worker of a batch, with marks that show a job that two have at once."""
    chance = random.Random(seed)
    # The kernel closes the files of a killed process in turn: these locks go before the ledger's.
    marks = os.open(folder / "marks", os.O_RDWR | os.O_CREAT)
    with fresh(folder, 80) as ledger:
        worker = LedgerWorker(ledger)
        while True:
            ledger.free_abandoned()
            job = worker.claim()
            if job is None:
                return
            try:
                fcntl.lockf(marks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, job.number)
            except OSError:
                (folder / f"{job.number}.twice").touch()
            kept = job.output.exists()
            if not kept:
                time.sleep(chance.random() / 50)
                part = folder / f"{job.number}.{os.getpid()}.part"
                part.write_bytes(b"video")
                os.link(part, job.output)  # fails where there is one
            worker.done(job, {"pid": os.getpid()}, kept=kept)
            fcntl.lockf(marks, fcntl.LOCK_UN, 1, job.number)


def spawn(folder, seed):
    pid = os.fork()
    if pid == 0:
        try:
            work(folder, seed)
            os._exit(0)
        except BaseException as error:  # noqa: BLE001 - a child of pytest
            (folder / f"{os.getpid()}.failed").write_text(repr(error))
        finally:
            os._exit(1)
    return pid


def test_workers_killed_at_random_moments_lose_no_job_and_make_none_twice(tmp_path):
    chance, kills = random.Random(5), 0
    workers = {spawn(tmp_path, number) for number in range(3)}
    while workers:
        time.sleep(chance.random() / 20)
        if kills < 25:
            if len(list(tmp_path.glob("*.part"))) <= kills:  # on a busy machine they begin late
                continue
            kills += 1
            os.kill(victim := chance.choice(sorted(workers)), signal.SIGKILL)
            workers.add(spawn(tmp_path, kills + 10))
            os.waitpid(victim, 0)
            workers.remove(victim)
            continue
        status = os.waitpid(workers.pop(), 0)[1]
        assert status == 0, [path.read_text() for path in tmp_path.glob("*.failed")]
    with fresh(tmp_path, 80) as ledger:
        assert ledger.free_abandoned() == []
        counts = ledger.counts()
        attempts = sum(row["attempt"] for row in ledger.rows())
        failed = [row["deaths"] for row in ledger.rows("failed")]  # killed so often by chance
    assert counts["done"] + counts["skipped"] + len(failed) == 80, counts
    assert set(failed) <= {MOST_DEATHS}
    assert attempts > 80, "no job was interrupted"
    assert list(tmp_path.glob("*.twice")) == []
    assert list(tmp_path.glob("*.failed")) == []
