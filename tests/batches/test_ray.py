"""A batch on a real Ray cluster of two nodes in this machine: `make test-ray` installs Ray."""

import os
import signal
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from tests.batches.fakes import fake_ledger
from wancli.batches.remote_maker import NodeReport, installed_versions
from wancli.batches.worker_process import WorkerWarning
from wancli.batches.workers import WorkerPlace, WorkerPool
from wancli.errors import SetupError
from wancli.records.ledger import create_ledger, open_ledger
from wancli.records.ledger_file import LedgerJob, LedgerSettings
from wancli.records.ledger_worker import LedgerWorker

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
PROMPTS = ["wait once", "a", "a", "a", "fail", "a"]


class Nodes:
    """A cluster whose head has no CPU for actors, and two nodes with one each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        os.environ.update(RAY_worker_niceness="0")  # its actors would wait for busy processes
        self.cluster: Any = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(2)]

    def remove(self, node_id: str) -> None:
        """Remove a node, and add another when the test is over."""
        (node,) = [one for one in self.nodes if one.node_id == node_id]
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def complete(self) -> None:
        """Have two nodes again."""
        while len(self.nodes) < 2:
            self.nodes.append(self.cluster.add_node(num_cpus=1))


@pytest.fixture(scope="module")
def cluster():
    nodes = Nodes()
    yield nodes
    nodes.cluster.shutdown()


@pytest.fixture
def nodes(cluster):
    cluster.complete()
    return cluster


@pytest.fixture
def pool(nodes, tmp_path, monkeypatch):
    """A function that runs a batch on the cluster, with what else happens once a job waits."""

    def run(prompts, meanwhile=None, **options):
        place = WorkerPlace("ray", {}, "tests.batches.fake_ray")
        options = {"address": nodes.cluster.address, "workers": 2, **options}
        warnings = []

        def on_message(_number, message):
            if isinstance(message, WorkerWarning):
                warnings.append(message.text)
            waits = list(tmp_path.glob("*.waits"))
            if waits and meanwhile:
                pid = int(waits[0].read_text())
                waits[0].unlink()
                meanwhile(pid)

        with fake_ledger(tmp_path, prompts) as ledger:
            running = WorkerPool(ledger, [place], options, on_message=on_message)
            outcomes = list(running.run())
            rows = list(ledger.rows())
        return outcomes, rows, warnings

    return run


def states(rows):
    return [row["state"] for row in rows]


def check(rows):
    """All are done but the one that fails, and whole."""
    assert states(rows) == ["done"] * 4 + ["failed", "done"]
    for row in rows:
        if row["state"] == "done":
            assert Path(row["output"]).read_bytes() == b"video"


def test_actors_make_all_jobs_and_send_files_back(pool, tmp_path):
    outcomes, rows, _ = pool(PROMPTS[1:], apart=True)
    assert len(outcomes) == 5
    assert states(rows) == ["done", "done", "done", "failed", "done"]
    assert len(list(tmp_path.glob("*.mp4"))) == len(list(tmp_path.glob("*.json"))) == 4
    assert list(tmp_path.glob(".*.part")) == []


def test_a_job_whose_actor_is_killed_is_made_by_another(pool):
    _, rows, warnings = pool(PROMPTS, lambda pid: os.kill(pid, signal.SIGKILL))
    check(rows)
    assert (rows[0]["attempt"], rows[0]["deaths"]) == (2, 1)
    assert any("died in 0.mp4; Ray replaces it." in text for text in warnings)


def test_a_job_whose_node_is_removed_is_made_on_the_other(pool, nodes, tmp_path):
    def remove(pid):
        nodes.remove((tmp_path / f"{pid}.node").read_text())

    _, rows, _ = pool(PROMPTS, remove)
    check(rows)
    assert rows[0]["attempt"] == 2


def test_a_job_that_is_cancelled_ends_with_its_actor(pool, tmp_path):
    def cancel(_pid):
        with open_ledger(tmp_path / "b.ledger") as ledger:
            ledger.cancel([1])

    outcomes, rows, _ = pool(["wait", "a", "a"], cancel)
    assert states(rows) == ["cancelled", "done", "done"]
    assert sorted(outcome.status for outcome in outcomes) == ["cancelled", "ok", "ok"]


def test_actors_take_over_the_last_job_of_another_process(pool, tmp_path):
    with fake_ledger(tmp_path, ["a", "a"]) as ledger:
        other = LedgerWorker(ledger)
        assert other.claim()
        Timer(25.0, other._lock.release).start()  # as if it died, after the actors have begun
        outcomes, rows, _ = pool(["a", "a"])
    assert [outcome.job.number for outcome in outcomes] == [2, 1]
    assert rows[0]["attempt"] == 2


def test_a_killed_driver_is_started_again(pool):
    drivers = set()

    def kill(_pid):
        (driver,) = _children(b"tests.batches.fake_ray")
        drivers.add(driver)
        os.kill(driver, signal.SIGKILL)

    _, rows, warnings = pool(PROMPTS, kill)
    check(rows)
    assert drivers
    assert any(text.startswith("ray was killed by SIGKILL") for text in warnings)


def _children(word: bytes) -> list[int]:
    """Our child processes with a word on their command lines."""
    found = []
    for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
        if word in Path(f"/proc/{child}/cmdline").read_bytes():
            found.append(int(child))
    return found


def test_other_versions_are_refused():
    from wancli.batches.ray_driver import problems_of

    there = {**installed_versions(), "torch": "1.0"}
    (problem,) = problems_of(NodeReport("gpu-2", there, True, []))
    assert str(problem).startswith("gpu-2 has torch 1.0, and this machine torch ")
    assert list(problems_of(NodeReport("gpu-2", installed_versions(), True, []))) == []


def test_a_machine_that_lacks_weights_is_named_and_no_file_is_left(nodes, tmp_path):
    settings = [LedgerSettings(0, "generate", {"model": "wan2.1-t2v-1.3b"})]
    jobs = [LedgerJob(1, 0, "a", 1, str(tmp_path / "a.mp4"))]
    place = WorkerPlace("ray", {}, "tests.batches.fake_ray")
    options = {"address": nodes.cluster.address, "workers": 1}
    with create_ledger(tmp_path / "b.ledger", "d", settings, jobs, version="1") as ledger:
        running = WorkerPool(ledger, [place], options, on_message=lambda *_: None)
        with pytest.raises(SetupError, match=r"the weights of wan2.1-t2v-1.3b are missing"):
            list(running.run())
    assert not list(tmp_path.glob(".*.part"))


def test_where_no_cluster_answers_the_command_says_so_at_once(pool):
    with pytest.raises(SetupError, match="no Ray cluster answers at 127.0.0.1:1: "):
        pool(["a"], address="127.0.0.1:1")
