"""Whether the videos that a ledger calls done are there, and intact."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wancli.records.ledger import DONE, SKIPPED, Ledger
from wancli.records.ledger_file import parse_column
from wancli.video.integrity import DAMAGED, MISSING, Check, check_video


def damaged_jobs(ledger: Ledger) -> Iterator[tuple[dict[str, Any], Check]]:
    """Rows of finished jobs whose video is missing or damaged. Reads all of their videos."""
    for row in ledger.rows(DONE, SKIPPED):
        video = Path(row["output"])
        there = video.is_file()
        check = check_video(video, parse_column(row, "record") or {}) if there else Check(MISSING)
        if check.status in (DAMAGED, MISSING):
            yield row, check
