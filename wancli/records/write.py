"""Start, complete and write records."""

import platform
from dataclasses import replace
from datetime import UTC, datetime
from time import perf_counter
from uuid import uuid4

from wancli.errors import WancliError
from wancli.records.record import Request, RunRecord, error_json, rounded
from wancli.utils.packages import package_version
from wancli.utils.threads import thread_settings


def start_record(request: Request, *, command: str, created: datetime) -> RunRecord:
    """The record of a request that has not run yet."""
    return RunRecord(
        id=uuid4().hex[:12],
        status="failed",
        command=command,
        created=created.isoformat(timespec="seconds"),
        request=request.as_json(),
        hash=request.hash,
        warnings=request.warnings,
        lora=request.loras,
    )


def failed_record(request: Request, error: WancliError, *, command: str) -> RunRecord:
    """The record of a failed request."""
    record = start_record(request, command=command, created=datetime.now(UTC))
    return replace(record, error=error_json(error))


def versions() -> dict[str, str]:
    """Versions and thread settings that the frames depend on."""
    packages = ("wancli", "torch", "diffusers", "transformers", "imageio-ffmpeg", "torchao")
    env = {"python": platform.python_version(), "platform": platform.platform()}
    env["threads"] = thread_settings()
    return env | {name: version for name in packages if (version := package_version(name))}


class TimedRecord:
    """The record of a video that is saved from now on, with the times of that."""

    def __init__(self, record: RunRecord, started: float) -> None:
        """`started`, when the work on the video began, is by `perf_counter`."""
        self._record, self._started, self._saving = record, started, perf_counter()

    def now(self) -> RunRecord:
        """The record with the times up to now."""
        now = perf_counter()
        spent = {"save_s": now - self._saving, "total_s": now - self._started}
        return replace(self._record, timings=rounded({**self._record.timings, **spent}))
