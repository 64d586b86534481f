"""Videos that are there already: whether they are of a request, and whether they are whole."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wancli.errors import InputError
from wancli.records.record import parse_record, read_record_file
from wancli.video.integrity import DAMAGED, Check, check_video
from wancli.video.read import read_comment


def check_existing(video: Path, digest: str) -> Check | None:
    """How the video is that was made of the request with that hash; None for any other file.

    One that lost its record, or was written without, is known by the record beside it, if it can be
    that file: of its length, or cut short.
    """
    inside = record_in(video)
    check = check_video(video, inside) if inside else None
    if inside and check and (inside["hash"] == digest or check.status != DAMAGED):
        return check if inside["hash"] == digest else None
    beside = record_beside(video)
    if not beside or beside["hash"] != digest or not _may_be(video, beside.get("output", {})):
        return None
    return check or check_video(video, beside)


def record_in(video: Path) -> dict[str, Any] | None:
    """The record inside a video; None where there is none.

    Earlier versions told of the file only beside it: then the same record from there.
    """
    try:
        inside = parse_record(read_comment(video) or "", origin=str(video))
    except InputError:
        return None
    beside = None if inside.get("output") else record_beside(video)
    return beside if beside and beside["id"] == inside["id"] else inside


def record_beside(video: Path) -> dict[str, Any] | None:
    """The record in NAME.json; None where there is none."""
    try:
        return read_record_file(video.with_suffix(".json"))
    except InputError:
        return None


def _may_be(video: Path, written: Mapping[str, Any]) -> bool:
    size, before = video.stat().st_size, written.get("bytes", 0)
    try:
        read_comment(video)
    except InputError:  # it has no index: zeros, or cut short
        return bool(size <= before)
    return bool(size == before)
