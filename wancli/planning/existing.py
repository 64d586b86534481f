"""Existing videos: whether they match a request, and whether they are intact."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wancli.errors import OVERWRITE_HINT, InputError, UsageError
from wancli.records.record import Request, parse_record, read_record_file
from wancli.video.integrity import DAMAGED, Check, check_video
from wancli.video.read import read_comment


def check_existing(video: Path, request: Request) -> Check | None:
    """Check a video made from a request; None for any other file.

    A video without an embedded record is identified by its sidecar, if its size matches or it is
    truncated.
    """
    inside = record_in(video)
    check = check_video(video, inside) if inside else None
    ours = inside is not None and request.is_recorded_by(inside)
    if check and (ours or check.status != DAMAGED):
        return check if ours else None
    beside = record_beside(video)
    if not beside or not request.is_recorded_by(beside):
        return None
    if not _may_be(video, beside.get("output", {})):
        return None
    return check or check_video(video, beside)


def existing_video(video: Path, request: Request, *, overwrite: bool = False) -> Check | None:
    """Check a video made from a request; None where there is no file, or one to `overwrite`.

    Raises UsageError for a file of another request that is not to be overwritten.
    """
    if not video.exists():
        return None
    check = check_existing(video, request)
    if check is None and not overwrite:
        message = f"{video} exists and comes from another request."
        raise UsageError(message, hint=OVERWRITE_HINT)
    return check


def is_kept(check: Check | None) -> bool:
    """Whether a video that `existing_video` has looked for is there, and intact."""
    return check is not None and check.status != DAMAGED


def is_video_of(path: Path, *, request: Request) -> bool:
    """Whether a video comes from a request, damaged or not."""
    return check_existing(path, request) is not None


def read_record(file: Path) -> dict[str, Any]:
    """Record of a video or of its sidecar. Raises InputError."""
    if file.suffix == ".json":
        return read_record_file(file)
    return parse_record(read_comment(file) or "", origin=str(file))


def record_in(video: Path) -> dict[str, Any] | None:
    """The record embedded in a video, or None.

    Earlier versions described the output file only in the sidecar: then the same record from there.
    """
    try:
        inside = parse_record(read_comment(video) or "", origin=str(video))
    except InputError:
        return None
    beside = None if inside.get("output") else record_beside(video)
    return beside if beside and beside["id"] == inside["id"] else inside


def record_beside(video: Path) -> dict[str, Any] | None:
    """The record in NAME.json, or None."""
    try:
        return read_record_file(video.with_suffix(".json"))
    except InputError:
        return None


def record_of(video: Path) -> dict[str, Any] | None:
    """The record of a video, in it or else beside it, or None."""
    return record_in(video) or record_beside(video)


def _may_be(video: Path, written: Mapping[str, Any]) -> bool:
    size, before = video.stat().st_size, written.get("bytes", 0)
    try:
        read_comment(video)
    except InputError:  # no index: zeros, or truncated
        return bool(size <= before)
    return bool(size == before)
