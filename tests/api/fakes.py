"""A worker that makes its videos of nothing."""

from collections.abc import Mapping
from typing import Any

from wancli.api.batch_worker import BatchWorker
from wancli.records.ledger import ClaimedJob, LedgerWorker


class FakeWorker(BatchWorker):
    """A worker without a model."""

    def _make(self, worker: LedgerWorker, job: ClaimedJob) -> tuple[Mapping[str, Any], bool]:
        job.output.write_bytes(b"video")
        return {"id": str(job.number)}, False
