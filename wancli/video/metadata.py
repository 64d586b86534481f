"""The output section of a record."""

from dataclasses import asdict
from typing import Any

from wancli.video.write import WrittenVideo


def output_json(written: WrittenVideo) -> dict[str, Any]:
    """The output section of a record for a written file."""
    fields = {"path": str(written.path), "duration_s": round(written.duration_s, 3)}
    return {**asdict(written), **fields, "complete": True}
