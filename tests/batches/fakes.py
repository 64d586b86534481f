"""Workers that make their videos of nothing, in this process or in one of their own.

The prompt says what they do: `die`, `fail`, `break` (an unexpected error), `wait`, `wait once` (at
the first attempt), or nothing.
"""

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wancli.batches import worker_process
from wancli.batches.worker import BatchWorker, Beat, JobMaker
from wancli.errors import RunError
from wancli.records.ledger import ClaimedJob, Ledger, create_ledger
from wancli.records.ledger_file import LedgerJob, LedgerSettings

# For `wancli.batches.workers`, in place of its own.
START = (
    "import signal, sys, json; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    "sys.path[:] = json.loads(sys.argv[1]); "
    "from tests.batches.fakes import main; main(*sys.argv[2:])"
)


class FakeMaker(JobMaker):
    """Makes jobs without a model."""

    def make(self, job: ClaimedJob, beat: Beat) -> tuple[Mapping[str, Any], bool]:
        """Do what the prompt says."""
        what = job.prompt or ""
        if what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "fail":
            raise RunError("no.", hint="less")
        if what == "break":
            raise ValueError("broken")
        if what == "wait" or (what == "wait once" and job.attempt == 1):
            job.output.with_suffix(".waits").write_text(f"{os.getpid()}")
            time.sleep(60)
        job.output.write_bytes(b"video")
        for path in job.files.values():
            Path(path).write_bytes(b"file")
        record = {"pid": os.getpid(), "output": {"path": str(job.output)}}
        job.output.with_suffix(".json").write_text(json.dumps(record))
        return record, False


class FakeWorker(BatchWorker):
    """A worker without a model."""

    def __init__(self, ledger: Ledger, **options: Any) -> None:
        super().__init__(ledger, **options)
        self._maker = FakeMaker()


def fake_ledger(folder: Path, prompts: Sequence[str]) -> Ledger:
    """The ledger of jobs with these prompts."""
    jobs = [LedgerJob(n + 1, 0, p, n, str(folder / f"{n}.mp4")) for n, p in enumerate(prompts)]
    settings = [LedgerSettings(0, "generate", {})]
    return create_ledger(folder / "b.ledger", "d", settings, jobs, version="1")


def main(*arguments: str) -> None:
    """A worker process whose worker is fake."""
    vars(worker_process)["BatchWorker"] = FakeWorker
    worker_process.main(*arguments)
