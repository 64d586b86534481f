"""Batches on a Ray cluster: the only importer of ray.

Ray places the actors, a GPU each, and replaces those that die; this process claims a job for each
actor that is ready, and alone writes the ledger. It is a process of its own, which
`wancli.batches.workers` starts, because Ray prints to standard output and handles signals.
"""

import json
import logging
import os
import signal
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any, NoReturn

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from wancli.api.requests import Listener
from wancli.batches.jobs import plan_job, with_files
from wancli.batches.received_files import ReceivedFiles
from wancli.batches.remote_maker import (
    FilePiece,
    NodeNeeds,
    NodeReport,
    RemoteMaker,
    RemoteMessage,
    installed_versions,
    node_needs,
    report_node,
)
from wancli.batches.worker import BEAT_S, JobOutcome, note_outcome
from wancli.batches.worker_process import (
    ActorMessage,
    JobStarted,
    Message,
    Send,
    WorkerWarning,
    serve,
)
from wancli.errors import SetupError, UsageError, WancliError, first_line, is_unexpected, some
from wancli.generation.batch import PlannedVideos
from wancli.planning.existing import record_of
from wancli.records.ledger import ClaimedJob, Ledger, died_error
from wancli.records.ledger_worker import JobCancelled, LedgerWorker
from wancli.rollouts.session import RolloutSession
from wancli.utils.heap import keep_heap
from wancli.utils.interrupts import SIGNALS
from wancli.utils.units import is_count

_LOOK_S = 1.0  # seconds between looks at the ledger while no actor says anything
_CONNECT_S = 5.0
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_START_S = 60.0  # seconds until a warning that no actor has started


class RayActor(RemoteMaker):
    """A process of the cluster with a loaded model."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """`options` are keyword arguments of JobMaker."""
        keep_heap()
        super().__init__(options)

    @ray.method(max_task_retries=-1)  # type: ignore[untyped-decorator]
    def ready(self, needs: NodeNeeds) -> NodeReport:
        """Look at this machine. Ray tries it again until the actor, or another for it, is there."""
        return report_node(needs)


@dataclass
class _Slot:
    """An actor, who takes jobs for it from the ledger, and what it is doing."""

    number: int
    actor: Any
    worker: LedgerWorker
    waits_for: Any  # a reference to the report of `ready`, or the stream of a job
    host: str = ""
    send_back: bool = False
    job: ClaimedJob | None = None
    files: ReceivedFiles | None = None
    beat: float = 0.0

    @property
    def name(self) -> str:
        """For people."""
        return f"ray {self.number}" + (f" ({self.host})" if self.host else "")


class RayPool:
    """Actors that make the jobs of a ledger."""

    def __init__(
        self, ledger: Ledger, send: Send, needs: NodeNeeds, *, workers: int | None, retries: int,
        options: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """`workers` None: one for each GPU of the cluster, or for each CPU of one without any.

        Raises SetupError where a machine lacks what the jobs need.
        """
        self._ledger, self._send, self._retries = ledger, send, retries
        self._skip = bool(options.get("skip_existing"))
        self._needs = needs
        self._unit = "GPU" if ray.cluster_resources().get("GPU") else "CPU"
        count = workers or int(ray.cluster_resources().get(self._unit, 1))
        resources = {"num_gpus": 1} if self._unit == "GPU" else {"num_cpus": 1}
        remote = ray.remote(max_restarts=-1, **resources)(RayActor)
        self._check_nodes()
        self._slots = []
        for number in range(count):
            actor = remote.remote(options)
            worker = LedgerWorker(ledger)
            self._slots.append(_Slot(number, actor, worker, actor.ready.remote(self._needs)))
        self._began, self._looked = monotonic(), 0.0

    def run(self) -> None:
        """Make jobs until none is left, waiting for those of others, who may die."""
        while True:
            self._free_abandoned()
            for slot in self._slots:
                if slot.waits_for is None:
                    self._begin(slot)
            busy = any(slot.job for slot in self._slots)
            if not busy and not self._is_left():
                return
            self._poll()

    def _free_abandoned(self) -> None:
        """Look now and then for jobs of other processes that have died."""
        if monotonic() - self._looked < _LOOK_S:
            return
        self._looked = monotonic()
        for failed in self._ledger.free_abandoned():
            self._report(0, JobOutcome(failed, error=died_error()))

    def close(self) -> None:
        """Give back what runs, and end the actors."""
        for slot in self._slots:
            slot.worker.close()
            ray.kill(slot.actor)
            if slot.files:
                slot.files.drop()

    def _is_left(self) -> bool:
        counts = self._ledger.counts()
        return counts["pending"] + counts["running"] > 0

    def _check_nodes(self) -> None:
        """Compare the machines that actors may be placed on. Raises SetupError."""
        look = ray.remote(num_cpus=0)(_look_at_node)
        nodes = [
            node["NodeID"] for node in ray.nodes()
            if node["Alive"] and node["Resources"].get(self._unit, 0) >= 1
        ]  # fmt: skip
        strategies = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
        reports = ray.get(
            [look.options(scheduling_strategy=s).remote(self._needs) for s in strategies]
        )
        for problem in (one for report in reports for one in problems_of(report)):
            raise problem

    def _begin(self, slot: _Slot) -> None:
        """Give an actor its next job, if one waits."""
        job = slot.worker.claim()
        if job is None:
            return
        slot.job, slot.beat = job, monotonic()
        self._report(slot.number, JobStarted(job))
        if slot.send_back:
            try:
                planned = self._planned(job)
                replaced = planned.check_outputs()
            except WancliError as error:
                self._finish(slot, JobOutcome(job, error=error))
                return
            if planned.kept:
                record = record_of(job.output) or {}
                self._finish(slot, JobOutcome(job, record=record, kept=True))
                return
            slot.files = ReceivedFiles(replaced)
        stream = slot.actor.make.options(num_returns="streaming")
        slot.waits_for = stream.remote(job, send_back=slot.send_back)

    def _planned(self, job: ClaimedJob) -> PlannedVideos | RolloutSession:
        """A job as it would be made here, where its files belong. Raises WancliError."""
        skip = self._skip or job.attempt > 1
        values = {**with_files(job.values, job.files), "skip_existing": skip}
        return plan_job(
            job.command, job.prompt, values, Listener(None), seed=job.seed, output=job.output
        )

    def _poll(self) -> None:
        """Wait for an actor to say something, and note now and then that jobs go on."""
        if not self._slots:
            raise SetupError("no actor of the cluster is left.", hint="ray status")
        waiting = {slot.waits_for: slot for slot in self._slots if slot.waits_for is not None}
        if not waiting:  # what is left is other processes'
            sleep(_LOOK_S)
            return
        messages, _ = ray.wait(list(waiting), num_returns=1, timeout=_LOOK_S, fetch_local=True)
        if messages:  # all that have spoken at once: with many actors a look at each takes long
            messages, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        for one in messages:
            slot = waiting[one]
            try:
                if slot.job:
                    self._receive(slot, slot.job)
                else:
                    self._on_ready(slot)
            except RayActorError:
                self._on_death(slot)
        for slot in self._slots:
            self._beat(slot)
        self._warn_without_actors()

    def _warn_without_actors(self) -> None:
        """Warn now and then while no actor has started."""
        if not any(slot.host for slot in self._slots) and monotonic() - self._began > _START_S:
            self._began = monotonic()
            text = f"no actor has started: the cluster has no free {self._unit}."
            self._report(0, WorkerWarning(text, "ray status"))

    def _on_ready(self, slot: _Slot) -> None:
        """Take note of where an actor is; one on a machine that lacks something is dropped."""
        try:
            report = ray.get(slot.waits_for)
        except RayActorError as error:  # Ray has given it up
            self._drop(
                slot, WorkerWarning(f"{slot.name} is lost: {first_line(error)}", "ray status")
            )
            return
        slot.waits_for, slot.host, slot.send_back = None, report.host, not report.sees_folder
        if problem := next(problems_of(report), None):
            self._drop(slot, WorkerWarning(str(problem), problem.hint))

    def _drop(self, slot: _Slot, warning: WorkerWarning) -> None:
        """Go on without an actor."""
        self._report(slot.number, warning)
        self._slots.remove(slot)
        slot.worker.close()
        ray.kill(slot.actor)

    def _receive(self, slot: _Slot, job: ClaimedJob) -> None:
        """Take what an actor says about its job. Raises RayActorError if it has died."""
        try:
            self._handle(slot, ray.get(next(slot.waits_for)))
        except RayActorError:
            raise
        except WancliError as error:
            self._finish(slot, JobOutcome(job, error=error))
        except (RayError, StopIteration) as error:
            text = f"unexpected {type(error).__name__}: {first_line(error)}"
            self._finish(slot, JobOutcome(job, error=WancliError(text, hint="ray logs")))

    def _handle(self, slot: _Slot, message: RemoteMessage) -> None:
        """Take one message about a job. Raises OutputError for a file that cannot be written."""
        if isinstance(message, JobOutcome):
            self._finish(slot, slot.files.place(message) if slot.files else message)
        elif isinstance(message, FilePiece):
            if slot.files:
                slot.files.write(message)
        else:
            self._report(slot.number, message)

    def _finish(self, slot: _Slot, outcome: JobOutcome) -> None:
        """Note how a job has ended; after an unexpected error Ray replaces the actor."""
        if slot.files:
            slot.files.drop()
        broken = is_unexpected(outcome.error)
        noted = note_outcome(slot.worker, outcome, retries=self._retries)
        slot.job = slot.files = slot.waits_for = None
        self._report(slot.number, noted)
        if broken:
            self._replace(slot)

    def _replace(self, slot: _Slot) -> None:
        """Let Ray start an actor anew; until it is ready it gets no job."""
        ray.kill(slot.actor, no_restart=False)
        slot.waits_for = slot.actor.ready.remote(self._needs)

    def _on_death(self, slot: _Slot) -> None:
        """Give back the job of an actor that has died; Ray replaces it."""
        job, failed = slot.job, self._ledger.free(slot.worker.name)
        if slot.files:
            slot.files.drop()
        slot.job, slot.files = None, None
        slot.waits_for = slot.actor.ready.remote(self._needs)
        if job:
            text = f"{slot.name} died in {job.output.name}; Ray replaces it."
            self._report(slot.number, WorkerWarning(text, "ray logs says why"))
        for one in failed:
            self._report(slot.number, JobOutcome(one, error=died_error()))

    def _beat(self, slot: _Slot) -> None:
        """Note that a job goes on, or end it if it was cancelled."""
        if slot.job is None or monotonic() - slot.beat < BEAT_S:
            return
        slot.beat = monotonic()
        try:
            slot.worker.beat(slot.job)
        except JobCancelled as error:
            self._finish(slot, JobOutcome(slot.job, error=error))
            self._replace(slot)

    def _report(self, number: int, message: Message) -> None:
        self._send(ActorMessage(number, message))


def _look_at_node(needs: NodeNeeds) -> NodeReport:
    """Look at a machine beside its actors: Ray hides GPUs from what asks for none."""
    if os.environ.get(_VISIBLE) == "":
        del os.environ[_VISIBLE]
    return report_node(needs)


def problems_of(report: NodeReport) -> Iterator[WancliError]:
    """Why a machine cannot take part."""
    ours = installed_versions()
    other = [name for name, version in report.versions.items() if version != ours[name]]
    if other:
        there, here = (
            some([f"{name} {versions[name] or '(none)'}" for name in other])
            for versions in (report.versions, ours)
        )
        yield SetupError(
            f"{report.host} has {there}, and this machine {here}.",
            hint="the same versions on all machines of the cluster",
        )
    for error in report.problems:
        yield SetupError(f"{report.host}: {error}", hint=error.hint)


def main(ledger: str, file: str, options: str) -> NoReturn:
    """Drive a cluster until no job of a ledger is left, as `wancli.batches.worker_process` does."""
    serve(ledger, file, lambda opened, send: _drive(opened, send, **json.loads(options)))


def _drive(
    ledger: Ledger, send: Send, *, address: str | None, workers: int | None, retries: int = 0,
    **options: Any,
) -> None:  # fmt: skip
    _connect(address)
    try:
        with node_needs(ledger) as needs:
            pool = RayPool(ledger, send, needs, workers=workers, retries=retries, options=options)
            try:
                pool.run()
            finally:
                pool.close()
    finally:
        ray.shutdown()


def _connect(address: str | None) -> None:
    """Join a cluster that runs. Raises SetupError, UsageError."""
    if address and address.startswith("ray://"):
        raise UsageError(
            f"`address {address}` is Ray Client's, which streams nothing.",
            hint="run it on a machine of the cluster, with `address auto`",
        )
    address = address or os.environ.get("RAY_ADDRESS") or "auto"
    _check_answers(address)
    ours = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SetupError(
            f"cannot join a Ray cluster: {first_line(error)}", hint="ray start --head, or `address`"
        ) from None
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


def _check_answers(address: str) -> None:
    """Raise SetupError if nobody answers at HOST:PORT: Ray would wait for minutes."""
    host, colon, port = address.rpartition(":")
    if not (colon and is_count(port)):
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise SetupError(
            f"no Ray cluster answers at {address}: {first_line(error)}.",
            hint="ray start --head there, and its `address`",
        ) from None
