"""Whether a video is as it was written: by digests in its record, without decoding it.

`packets_sha256` is of the encoded packets, and outlives a copy of the stream into another file.
`file_sha256` is of every byte of the file, where its own digits in the record count as zeros: it is
put in last, in place, as a checksum in a header is.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wancli.errors import InputError
from wancli.video import read

WHOLE, DAMAGED, NO_DIGEST = "whole", "damaged", "no digest"
UNSEALED = "0" * 64  # what a record has for `file_sha256` until `seal`
_OWN = b'"file_sha256": "'


@dataclass(frozen=True)
class Check:
    """What was found: a status, and why it is not WHOLE."""

    status: str  # WHOLE, DAMAGED or NO_DIGEST
    why: str = ""


def check_video(path: Path, record: Mapping[str, Any]) -> Check:
    """Hold a video to a record of it, from inside or beside it.

    A record without digests is of an earlier version: then the video is decoded.
    """
    told = record.get("output")
    told = told if isinstance(told, dict) else {}
    try:
        if "file_sha256" not in told:
            return _decoded(path, told)
        if file_sha256(path) == told["file_sha256"]:
            return Check(WHOLE)
        if read.packets_sha256(path) == told.get("packets_sha256"):
            return Check(DAMAGED, "its packets are as they were written, but not the rest of it")
        return Check(DAMAGED, "its packets are not those that were written")
    except InputError as error:
        return Check(DAMAGED, str(error).replace(f"{path} is", "it is").rstrip("."))
    except OSError as error:
        return Check(DAMAGED, error.strerror or str(error))


def file_sha256(path: Path) -> str:
    """Of all bytes; its own digits in the record count as zeros. Raises InputError, OSError."""
    own, digest = _own_digits(path), hashlib.sha256()
    with path.open("rb") as file:
        if own is not None:
            read.update(digest, file, own)
            digest.update(UNSEALED.encode())
            file.seek(own + len(UNSEALED))
        read.update(digest, file)
    return digest.hexdigest()


def seal(path: Path) -> str:
    """Put the file's digest into its record, if that has a place for it; InputError, OSError."""
    own, digest = _own_digits(path), file_sha256(path)
    if own is not None:
        with path.open("r+b") as file:
            file.seek(own)
            file.write(digest.encode())
    return digest


def _own_digits(path: Path) -> int | None:
    """Where in the file its record has `file_sha256`; in no string, since those escape quotes."""
    start, comment = read.find_comment(path)
    before, found, after = comment.partition(_OWN)
    return start + len(before) + len(_OWN) if found and len(after) >= len(UNSEALED) else None


def _decoded(path: Path, told: Mapping[str, Any]) -> Check:
    frames, md5 = read.decoded_md5(path)
    if told.get("framemd5", md5) != md5:
        return Check(DAMAGED, "its video frames are not those that were written")
    return Check(NO_DIGEST, f"an earlier version wrote it; {frames} video frames decode")
