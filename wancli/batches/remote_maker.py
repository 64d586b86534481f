"""Making jobs on another machine: it is checked, makes videos, and sends them back."""

import hashlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from queue import Full, Queue
from time import monotonic
from typing import Any

from wancli.api.requests import Listener
from wancli.batches.jobs import plan_job
from wancli.batches.worker import JobMaker, JobOutcome
from wancli.batches.worker_process import WorkerWarning
from wancli.catalog.hub_cache import cached_revision
from wancli.errors import SetupError, WancliError
from wancli.records.ledger import ClaimedJob, Ledger
from wancli.records.ledger_file import LedgerSettings
from wancli.records.ledger_worker import LedgerWorker
from wancli.records.progress import Event, Phase
from wancli.utils.files import is_part, remove
from wancli.utils.packages import package_version

PACKAGES = ("wancli", "torch", "diffusers")  # whose versions must be the same everywhere
_PIECE = 8 * 2**20  # bytes
_WAITING = 8  # messages that may wait to be sent
_EVENT_S = 1.0  # seconds between events of one phase


@dataclass(frozen=True)
class NodeNeeds:
    """The jobs of a batch as a machine checks whether it can make them."""

    settings: Sequence[LedgerSettings]
    prompts: Sequence[str | None]  # of one job of each settings
    probe: Path  # a file beside the videos


@dataclass(frozen=True)
class NodeReport:
    """State of a machine. `problems` are the reasons why it cannot make some of the jobs."""

    host: str
    versions: Mapping[str, str]
    sees_folder: bool
    problems: Sequence[WancliError]


@dataclass(frozen=True)
class FilePiece:
    """Bytes of a file on their way to where it belongs; the last piece has the digest of all."""

    path: Path
    data: bytes
    digest: str = ""


RemoteMessage = Event | WorkerWarning | FilePiece | JobOutcome


@contextmanager
def node_needs(ledger: Ledger) -> Iterator[NodeNeeds]:
    """The needs of the jobs, with a file beside their videos by which a shared folder is known.

    The file has the name of a worker, whose lock in the ledger's folder says that it is in use;
    those of killed processes are removed.
    """
    prompts: dict[int, str | None] = {}
    folders = set[str]()
    for row in ledger.rows("pending", "running"):
        prompts.setdefault(row["settings"], row["prompt"])
        folders.add(os.path.dirname(row["output"]))  # noqa: PTH120 - of 100,000
    folder = Path(os.path.commonpath(folders)) if folders else ledger.path.parent
    settings = ledger.settings()
    with closing(LedgerWorker(ledger)) as worker:
        probe = folder / f".{ledger.path.name}.{worker.name}.part"
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            for other in folder.glob(f".{escape(ledger.path.name)}.*.part"):
                if is_part(other.name) and not ledger.is_alive(other.name.split(".")[-2]):
                    remove(other)
            probe.touch()
        try:
            yield NodeNeeds([settings[n] for n in prompts], list(prompts.values()), probe)
        finally:
            remove(probe)


def report_node(needs: NodeNeeds) -> NodeReport:
    """Look at this machine: what it has of what the jobs need."""
    problems: dict[str, WancliError] = {}
    for settings, prompt in zip(needs.settings, needs.prompts, strict=True):
        try:
            _check_job(settings, prompt)
        except WancliError as error:
            problems[str(error)] = error
    there = needs.probe.exists()
    return NodeReport(socket.gethostname(), installed_versions(), there, list(problems.values()))


def installed_versions() -> dict[str, str]:
    """Versions that must be the same on all machines; a build for CPUs is of the same version."""
    return {name: package_version(name).partition("+")[0] for name in PACKAGES}


def _check_job(settings: LedgerSettings, prompt: str | None) -> None:
    planned = plan_job(settings.command, prompt, settings.values, Listener(None))
    repo = planned.spec.repo
    if repo and not cached_revision(repo):
        raise SetupError(
            f"the weights of {planned.spec.name} are missing.",
            hint=f"wancli model pull {planned.spec.name} there, or HF_HOME on a shared disk",
        )
    planned.capacity.check()


class RemoteMaker:
    """A loaded model that makes jobs one after the other, and reports while it does."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """`options` are keyword arguments of JobMaker."""
        self._messages: Queue[RemoteMessage | None] = Queue(_WAITING)
        self._maker = self._new_maker(options)
        self._reported = 0.0  # when an event was handed on
        self._thread = ThreadPoolExecutor(1)  # always the same: OpenMP has its threads by thread

    def _new_maker(self, options: Mapping[str, Any]) -> JobMaker:
        return JobMaker(**options, report=self._report, warn=self._warn)

    def make(self, job: ClaimedJob, *, send_back: bool) -> Iterator[RemoteMessage]:
        """Yield what happens, the files of the video if they are sent back, and the outcome."""
        done = self._thread.submit(self._make, job, send_back=send_back)
        while (message := self._messages.get()) is not None:
            yield message
        done.result()

    def _make(self, job: ClaimedJob, *, send_back: bool) -> None:
        try:
            if send_back:
                with tempfile.TemporaryDirectory(prefix="wancli-") as folder:
                    self._make_and_send(job, Path(folder))
            else:
                self._messages.put(self._maker.attempt(job, _no_beat))
        finally:
            self._messages.put(None)

    def _make_and_send(self, job: ClaimedJob, folder: Path) -> None:
        """Make a job in a folder of this machine, and send its files to their places."""
        video = folder / "0" / job.output.name
        files, places = dict[str, str](), {"0": job.output.parent}
        for number, (name, path) in enumerate(job.files.items(), 1):
            places[str(number)] = Path(path).parent
            files[name] = str(folder / str(number) / Path(path).name)
        for place in places:
            (folder / place).mkdir()
        outcome = self._maker.attempt(replace(job, output=video, files=files), _no_beat)
        if outcome.error is None:
            self._send_files(folder, places, renamed=(str(video), str(job.output)))
        self._messages.put(replace(outcome, job=job, record=_moved(outcome.record, job.output)))

    def _send_files(
        self, folder: Path, places: Mapping[str, Path], *, renamed: tuple[str, str]
    ) -> None:
        """Send all files; sidecars name the video where it will be."""
        for root, _, names in os.walk(folder):
            for path in (Path(root, name) for name in sorted(names) if not name.startswith(".")):
                place, *rest = path.relative_to(folder).parts
                if path.suffix == ".json" and len(rest) == 1:
                    _rename_in(path, renamed)
                self._send_file(path, places[place].joinpath(*rest))

    def _send_file(self, path: Path, place: Path) -> None:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while data := file.read(_PIECE):
                digest.update(data)
                self._messages.put(FilePiece(place, data))
        self._messages.put(FilePiece(place, b"", digest.hexdigest()))

    def _report(self, event: Event) -> None:
        """Hand an event on, unless one was just now: a thousand actors have one driver.

        If many are on their way it is dropped, too: a video must not wait for that.
        """
        now = monotonic()
        if not isinstance(event, Phase) and now - self._reported < _EVENT_S:
            return
        self._reported = now
        with suppress(Full):
            self._messages.put_nowait(event)

    def _warn(self, text: str, *, hint: str) -> None:
        self._messages.put(WorkerWarning(text, hint))


def _no_beat() -> None:
    """Nothing: the one who gave the job away notes that it goes on."""


def _moved(record: Mapping[str, Any] | None, path: Path) -> Mapping[str, Any] | None:
    """A record whose output is at `path`."""
    return record and {**record, "output": {**record.get("output", {}), "path": str(path)}}


def _rename_in(path: Path, renamed: tuple[str, str]) -> None:
    """Change a path that a JSON file names."""
    old, new = (json.dumps(text, ensure_ascii=False) for text in renamed)
    path.write_text(path.read_text("utf-8").replace(old, new), "utf-8")
