"""Worker processes: who dies is replaced, what runs is given back, nobody outlives the parent."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.batches.fakes import START, fake_ledger
from wancli.batches import workers
from wancli.batches.worker_process import JobStarted, WorkerWarning
from wancli.batches.workers import WorkerPlace, WorkerPool, worker_places
from wancli.cost.devices import Device
from wancli.errors import SetupError, UsageError
from wancli.records.ledger import open_ledger
from wancli.records.ledger_worker import LedgerWorker

TWO = [WorkerPlace(f"worker {n}", {}) for n in range(2)]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _fake_processes(monkeypatch):
    monkeypatch.setattr(workers, "_START", START)


def test_a_job_that_kills_its_workers_fails_and_the_others_are_made(tmp_path):
    prompts = ["a", "die", "fail", "break", "a"]
    warnings = []

    def on_message(number, message):
        if isinstance(message, WorkerWarning):
            warnings.append(message.text)

    with fake_ledger(tmp_path, prompts) as ledger:
        pool = WorkerPool(ledger, TWO, {}, on_message=on_message)
        outcomes = {outcome.job.number: outcome for outcome in pool.run()}
        states = [row["state"] for row in ledger.rows()]
    assert states == ["done", "failed", "failed", "failed", "done"]
    errors = {number: str(one.error) for number, one in outcomes.items() if one.error}
    assert errors == {
        2: "the process that made it was killed 3 times.",
        3: "no.",
        4: "unexpected ValueError: broken",
    }
    killed = "was killed by SIGKILL (out of memory?) in 1.mp4; another takes its place."
    assert len(warnings) == 3
    assert all(text.endswith(killed) for text in warnings)


def test_the_last_job_of_processes_that_died_with_their_parent_is_made(tmp_path):
    with fake_ledger(tmp_path, ["a"]) as ledger:
        with fake_ledger(tmp_path, ["a"]) as same:
            dead = LedgerWorker(same)
            assert dead.claim()
            dead._lock.release()  # as the kernel does
        made = list(WorkerPool(ledger, TWO, {}, on_message=lambda number, message: None).run())
        assert [outcome.job.attempt for outcome in made] == [2]


def test_stopped_workers_give_back_what_runs(tmp_path):
    with fake_ledger(tmp_path, ["a", "wait", "wait", "a"]) as ledger:
        started = []

        def on_message(_number, message):
            if isinstance(message, JobStarted):
                started.append(message.job.number)
                if {2, 3} <= set(started):
                    pool.stop()

        pool = WorkerPool(ledger, TWO, {}, on_message=on_message)
        assert [outcome.job.number for outcome in pool.run()] == [1]
        states = [(row["state"], row["deaths"]) for row in ledger.rows()]
    assert states == [("done", 0), ("pending", 0), ("pending", 0), ("pending", 0)]


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(tmp_path):
    fake_ledger(tmp_path, ["wait", "wait"]).close()
    script = (
        "import sys; from pathlib import Path\n"
        "from tests.batches.test_workers import run_for_ever; run_for_ever(Path(sys.argv[1]))"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT)
    with open_ledger(tmp_path / "b.ledger") as ledger:
        wait_until(lambda: ledger.counts()["running"] == 2)
        pids = [row["pid"] for row in ledger.rows()]
        parent.kill()
        parent.wait()
        wait_until(lambda: ledger.counts()["pending"] == 2)
        assert [row["deaths"] for row in ledger.rows()] == [0, 0]
    wait_until(lambda: not any(map(is_running, pids)))


def run_for_ever(folder: Path) -> None:
    workers._START = START
    with open_ledger(folder / "b.ledger") as ledger:
        list(WorkerPool(ledger, TWO, {}, on_message=lambda number, message: None).run())


def wait_until(condition) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "(Z)" not in Path(f"/proc/{pid}/stat").read_text()


GPUS = [Device("cuda", "H100", 1, 1)] * 4


@pytest.mark.parametrize(
    ("visible", "count", "devices", "names", "used"),
    [
        (None, None, [], ["gpu 0", "gpu 1", "gpu 2", "gpu 3"], ["0", "1", "2", "3"]),
        ("0,", None, [], ["gpu 0"], ["0"]),
        ("GPU-a", None, [], ["gpu GPU-a"], ["GPU-a"]),
        (None, None, [0, 2], ["gpu 0", "gpu 2"], ["0", "2"]),
        (None, 2, [], ["gpu 0", "gpu 1"], ["0", "1"]),
        (None, 3, [0, 2], ["worker 0", "worker 1", "worker 2"], ["0", "2", "0"]),
        ("GPU-a,GPU-b,GPU-c,GPU-d", None, [1], ["gpu GPU-b"], ["GPU-b"]),
        ("3,2,1,0", None, [0, 3], ["gpu 3", "gpu 0"], ["3", "0"]),
    ],
)
def test_each_worker_sees_one_gpu(monkeypatch, visible, count, devices, names, used):
    set_gpus(monkeypatch, GPUS, visible)
    places = worker_places(count, devices)
    assert [place.name for place in places] == names
    assert [place.variables["CUDA_VISIBLE_DEVICES"] for place in places] == used


def set_gpus(monkeypatch, gpus, visible=None):
    monkeypatch.setattr("wancli.cost.devices._look_for_gpus", lambda: gpus)
    monkeypatch.setattr(workers, "package_version", lambda name: "2.11+cu130")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


def test_without_a_gpu_workers_share_the_cores(monkeypatch):
    set_gpus(monkeypatch, [])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert [place.variables for place in worker_places(None)] == [{}]
    assert [place.variables for place in worker_places(3)] == [{"OMP_NUM_THREADS": "2"}] * 3


@pytest.mark.parametrize(
    ("devices", "error"), [([4], SetupError), ([1, 1], UsageError)], ids=["missing", "twice"]
)
def test_wrong_devices_are_refused(monkeypatch, devices, error):
    set_gpus(monkeypatch, GPUS)
    with pytest.raises(error, match="devices"):
        worker_places(None, devices)
