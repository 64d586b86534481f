"""`make bench-scale`: its simulation gives what can be worked out by hand."""

import pytest

from benchmarks.scale import CALLS, measure, simulate

FREE = dict.fromkeys(CALLS, 0.0)


def test_workers_work_all_the_time_while_writing_takes_none():
    one = simulate(50, [1.0, 2.0], FREE, checks=0.0)
    assert one.working == pytest.approx(1.0, abs=0.01)
    assert one.writing == 0


def test_a_ledger_that_writes_all_the_time_gives_its_rate_to_the_workers():
    one = simulate(10, [1.0], FREE | {"claim": 0.6, "done": 0.4}, checks=0.0)
    assert one.writing == pytest.approx(1.0, abs=0.02)
    assert one.working == pytest.approx(1 / 10, abs=0.01)  # a second of work a second, of ten


def test_the_calls_of_real_processes_are_timed(tmp_path):
    calls = measure(tmp_path, 2, jobs=40, seconds=0.5)
    assert calls.jobs_per_s == 80
    assert {name: len(times) for name, times in calls.seconds.items()} == {
        "free_abandoned": 42, "claim": 42, "beat": 40, "done": 40,
    }  # fmt: skip
