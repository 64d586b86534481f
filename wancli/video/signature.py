"""A signature in a PNG, GIF or WebP: wancli drew this picture of these videos, and it is unchanged.

It is a SHA-256 of the videos' names and of all other bytes, in a text chunk of the PNG, a comment
of the GIF or a chunk of the WebP, where each format keeps its metadata. Any change of the file by
anybody breaks it, so only a picture that `preview` can draw again is taken for its own.
"""

import hashlib
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

from wancli.utils.reading import open_file

_SOFTWARE = b"wancli preview "  # before the digest
_LENGTH = len(_SOFTWARE) + 64
_IEND = 12  # bytes of a PNG's last chunk
_LARGEST = 2**31  # bytes; larger files are not read


def sign(content: bytes, videos: Sequence[Path]) -> bytes:
    """The content of a PNG, GIF or WebP with a signature added."""
    text = _SOFTWARE + _digest(content, videos).encode()
    if content.startswith(b"\x89PNG"):
        chunk = b"tEXtSoftware\0" + text
        chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        return content[:-_IEND] + chunk + content[-_IEND:]
    if content.startswith(b"GIF8"):
        return content[:-1] + b"\x21\xfe" + bytes([len(text)]) + text + b"\0" + content[-1:]
    chunk = b"WNCL" + struct.pack("<I", len(text)) + text + b"\0" * (len(text) % 2)
    size = struct.pack("<I", len(content) - 8 + len(chunk))
    return content[:4] + size + content[8:] + chunk


def is_signed(path: Path, videos: Sequence[Path]) -> bool:
    """Whether a file is an unchanged picture that wancli drew of videos of these names."""
    try:
        with open_file(path) as file:
            content = file.read(_LARGEST)
    except OSError:
        return False
    return sign(_unsigned(content), videos) == content


def _unsigned(content: bytes) -> bytes:
    """The content without its signature, if it has one where `sign` adds it."""
    if content.startswith(b"\x89PNG"):
        return content[: -_IEND - _LENGTH - 21] + content[-_IEND:]
    if content.startswith(b"GIF8"):
        return content[: -_LENGTH - 5] + content[-1:]
    whole = content[: -_LENGTH - 8 - _LENGTH % 2]
    return whole[:4] + struct.pack("<I", max(0, len(whole) - 8)) + whole[8:]


def _digest(content: bytes, videos: Sequence[Path]) -> str:
    """SHA-256 of the videos' names, in order, and of the content."""
    digest = hashlib.sha256("\0".join(video.name for video in videos).encode())
    digest.update(b"\0" + content)
    return digest.hexdigest()
