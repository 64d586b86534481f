"""One display for all workers of a batch, which end after so many failures."""

import pytest

from tests.batches.fakes import FakeWorker
from tests.records.test_ledger import fresh
from wancli.batches.worker import JobMaker, JobOutcome
from wancli.cli.batch_run import BatchLine, BatchProgress, HowToWork, make_jobs, parse_workers
from wancli.cli.options import OutputOptions
from wancli.cli.screen import Screen
from wancli.errors import ModelError, UsageError
from wancli.records.batch_status import BatchStatus
from wancli.records.progress import Phase, Step


def status(done, failed=0, left_s=None):
    counts = dict.fromkeys(("running", "skipped", "cancelled"), 0)
    counts |= {"pending": 100 - done - failed, "done": done, "failed": failed}
    return BatchStatus(counts, [], [], None, left_s)


def test_the_display_has_every_worker_and_the_whole_batch():
    now, batch = 0.0, status(0)
    progress = BatchProgress(lambda: batch, ["gpu 0", "gpu 1"], clock=lambda: now)
    progress.start(1, "circle-1.mp4")
    run = progress.workers[1].run
    assert run
    run.handle(Phase("denoise"))
    run.handle(Step(1, 4, 0.5))
    assert progress.workers[0].text() == "waits"
    assert progress.workers[1].text().startswith("circle-1.mp4 denoise step 2/4 50%")
    assert progress.workers[1].fraction == 0.5
    assert BatchLine(progress).text() == ("0 of 100 done; gpu 0: waits; gpu 1: denoise step 2/4")
    now, batch = 10.0, status(24, failed=1, left_s=150.0)
    progress.end(1)
    now = 20.0
    assert progress.text() == "24 of 100 done, 1 failed, eta 2:20"
    assert progress.fraction == 0.25


def test_actors_of_a_cluster_are_shown_as_they_begin():
    progress = BatchProgress(lambda: status(0), ["worker 0"])
    progress.start(2, "a.mp4")
    assert [one.name for one in progress] == ["worker 0", "worker 1", "worker 2", "batch"]
    assert progress.workers[2].job == "a.mp4"


@pytest.mark.parametrize(
    ("workers", "devices", "expected"),
    [
        (None, None, (None, [])),
        ("auto", None, (None, [])),
        ("4", None, (4, [])),
        (None, "0, 2", (None, [0, 2])),
        ("auto", "1", (None, [1])),
    ],
)
def test_workers_and_devices_are_read(workers, devices, expected):
    assert parse_workers(workers, devices) == expected


@pytest.mark.parametrize(
    ("workers", "devices"),
    [("0", None), ("many", None), ("-1", None), (None, "a"), (None, ""), (None, "9" * 5_000)],
    ids=str,
)
def test_what_is_no_number_is_refused(workers, devices):
    with pytest.raises(UsageError):
        parse_workers(workers, devices)


@pytest.mark.parametrize(
    ("loaded", "most", "left"),
    [(True, None, 0), (True, 1, 3), (True, 2, 2), (False, 2, 2), (False, 3, 0)],
)
def test_a_batch_stops_after_so_many_failures_with_those_of_a_model_that_does_not_load(
    tmp_path, monkeypatch, loaded, most, left
):
    error = ModelError("no weights.", hint="wancli model pull demo")
    monkeypatch.setattr("wancli.batches.worker.BatchWorker", FakeWorker)
    monkeypatch.setattr(
        JobMaker, "attempt", lambda _, job, beat: JobOutcome(job, error=error, loaded=loaded)
    )
    with fresh(tmp_path, 4) as ledger:  # two jobs of each model
        make_jobs(ledger, HowToWork([], {}, most), Screen(OutputOptions(quiet=True)))
        assert ledger.counts() | {"pending": left, "failed": 4 - left} == ledger.counts()
