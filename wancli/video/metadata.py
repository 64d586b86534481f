"""The record that travels inside a video file."""

from dataclasses import asdict
from typing import Any

from wancli.video.write import WrittenVideo


def output_json(written: WrittenVideo) -> dict[str, Any]:
    """What a record says of a written file."""
    told = {"path": str(written.path), "duration_s": round(written.duration_s, 3)}
    return {**asdict(written), **told, "complete": True}
