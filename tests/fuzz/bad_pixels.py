"""Hostile videos and pictures."""

import random
import struct
import zlib
from pathlib import Path

from tests.fuzz.campaign import Case
from tests.fuzz.materials import PICTURES, SMALL
from tests.fuzz.mutations import damage
from tests.fuzz.spoiling import LATENTS, ROLL, TINY, Lines, good, put


def video(case: Case, rng: random.Random) -> Lines:
    """A video."""
    name = rng.choice(("clip.mp4", "made.mp4"))
    put(
        case,
        "x.mp4",
        _odd_video(case, rng) if rng.random() < 0.1 else damage(good(case, name), rng),
    )
    case.place.copy_in("clip.mp4")
    return [("preview", "x.mp4", "-q"), ("preview", "x.mp4", "--gif", "new.gif", "-q"), ("show",
    "x.mp4"),
            ("compare", "x.mp4", "clip.mp4"), (*ROLL, "--extend", "x.mp4", "--dry-run"),
            ("generate", "x", *TINY, "-o", "x.mp4", "--skip-existing", "--dry-run")]  # fmt: skip


def _odd_video(case: Case, rng: random.Random) -> bytes:
    """Content that ffmpeg would read too, but that is not an MP4."""
    playlist = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
    concat = b"ffconcat version 1.0\nfile /etc/passwd\n"
    return rng.choice((playlist, concat, good(case, "image.gif"), good(case, "image.png"),
                          b"RIFF\xff\xff\xff\xffAVI ", b"\x1aE\xdf\xa3", b"GIF89a", bytes(100),
                          b"<svg xmlns='http://www.w3.org/2000/svg'/>",
                          b"YUV4MPEG2 W1 H1 F1:1\nFRAME\n"))  # fmt: skip


def picture(case: Case, rng: random.Random) -> Lines:
    """A picture."""
    name = rng.choice(PICTURES)
    content = _bomb(rng) if rng.random() < 0.05 else damage(good(case, name), rng)
    shown = "x" + rng.choice((Path(name).suffix, Path(rng.choice(PICTURES)).suffix))
    put(case, shown, content)
    case.place.copy_in("tiny-image")
    generate = (
        "generate",
        "x",
        "--model",
        "tiny-image",
        *SMALL,
        "--num-frames",
        "5",
        "--image",
        shown,
    )
    return [
        (*generate, "--dry-run"), (*generate, "--dry-run"),
        (*ROLL, "--image", shown, "--dry-run"), (*ROLL, "--image", shown, *LATENTS),
        ("preview", shown),
    ]  # fmt: skip


def _bomb(rng: random.Random) -> bytes:
    """A decompression bomb: up to 100,000 by 100,000 pixels in a few bytes."""
    side = rng.choice((0, 1, 20_000, 100_000, 2**31 - 1, 2**32 - 1))
    header = struct.pack(
        ">IIBBBBB", side, side, rng.choice((1, 8, 16, 99)), rng.choice((0, 2, 3, 7)), 0, 0, 0
    )

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )
