"""Verify a video by the digests in its record, without decoding it.

`packets_sha256` covers the encoded packets, and survives a copy of the stream into another file.
`file_sha256` covers every byte of the file, with its own digits in the record counted as zeros: it
is written in place at the end, like a checksum in a header.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wancli.errors import InputError
from wancli.records.record import UNFINISHED
from wancli.video import read

WHOLE, DAMAGED, NO_DIGEST, MISSING = "whole", "damaged", "no digest", "missing"
UNSEALED = "0" * 64  # `file_sha256` of a record before `seal`
_OWN = b'"file_sha256": "'


@dataclass(frozen=True)
class Check:
    """The result of a check, and the reason if it is not WHOLE."""

    status: str  # WHOLE, DAMAGED, NO_DIGEST or MISSING
    why: str = ""


def check_video(path: Path, record: Mapping[str, Any]) -> Check:
    """Check a video against its record.

    A record without digests is of a video that is not finished, or from an earlier version: the
    video is then decoded.
    """
    output = record.get("output")
    output = output if isinstance(output, dict) else {}
    try:
        if "file_sha256" not in output:
            unfinished = record.get("status") == UNFINISHED
            why = "it is unfinished" if unfinished else "an earlier version wrote it"
            return _check_decoded(path, output, why)
        if file_sha256(path) == output["file_sha256"]:
            return Check(WHOLE)
        if read.packets_sha256(path) == output.get("packets_sha256"):
            return Check(DAMAGED, "its packets are intact, but not the rest of the file")
        return Check(DAMAGED, "its packets are not those that were written")
    except InputError as error:
        return Check(DAMAGED, str(error).replace(f"{path} is", "it is").rstrip("."))
    except OSError as error:
        return Check(DAMAGED, error.strerror or str(error))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, with its own digits in the record as zeros. Raises InputError, OSError."""
    own, digest = _own_digits(path), hashlib.sha256()
    with path.open("rb") as file:
        if own is not None:
            read.update(digest, file, own)
            digest.update(UNSEALED.encode())
            file.seek(own + len(UNSEALED))
        read.update(digest, file)
    return digest.hexdigest()


def seal(path: Path) -> str:
    """Write the file's digest into its record, if it has one. Raises InputError, OSError."""
    own, digest = _own_digits(path), file_sha256(path)
    if own is not None:
        with path.open("r+b") as file:
            file.seek(own)
            file.write(digest.encode())
    return digest


def _own_digits(path: Path) -> int | None:
    """Offset in the file of the record's `file_sha256`: no string holds the key unescaped."""
    start, comment = read.find_comment(path)
    before, key, _ = comment.partition(_OWN)
    return start + len(before) + len(_OWN) if key else None


def _check_decoded(path: Path, output: Mapping[str, Any], why: str) -> Check:
    frames, md5 = read.decoded_md5(path)
    if output.get("framemd5", md5) != md5:
        return Check(DAMAGED, "its video frames are not those that were written")
    return Check(NO_DIGEST, f"{why}; {frames} video frames decode")
