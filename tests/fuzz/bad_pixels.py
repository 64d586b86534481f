"""Hostile videos and pictures."""

import random
import struct
import zlib
from pathlib import Path

from tests.fuzz.campaign import Case
from tests.fuzz.materials import PICTURES, SMALL
from tests.fuzz.mutations import damage
from tests.fuzz.spoiling import LATENTS, ROLL, TINY, Lines, good, put


def video(case: Case, chance: random.Random) -> Lines:
    """A video."""
    name = chance.choice(("clip.mp4", "made.mp4"))
    put(
        case,
        "x.mp4",
        _odd_video(case, chance) if chance.random() < 0.1 else damage(good(case, name), chance),
    )
    case.place.take("clip.mp4")
    return [("preview", "x.mp4", "-q"), ("preview", "x.mp4", "--gif", "new.gif", "-q"), ("show",
    "x.mp4"),
            ("compare", "x.mp4", "clip.mp4"), (*ROLL, "--extend", "x.mp4", "--dry-run"),
            ("generate", "x", *TINY, "-o", "x.mp4", "--skip-existing", "--dry-run")]  # fmt: skip


def _odd_video(case: Case, chance: random.Random) -> bytes:
    """What is read by ffmpeg as well, and is no MP4 of ours."""
    playlist = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
    concat = b"ffconcat version 1.0\nfile /etc/passwd\n"
    return chance.choice((playlist, concat, good(case, "image.gif"), good(case, "image.png"),
                          b"RIFF\xff\xff\xff\xffAVI ", b"\x1aE\xdf\xa3", b"GIF89a", bytes(100),
                          b"<svg xmlns='http://www.w3.org/2000/svg'/>",
                          b"YUV4MPEG2 W1 H1 F1:1\nFRAME\n"))  # fmt: skip


def picture(case: Case, chance: random.Random) -> Lines:
    """A picture."""
    name = chance.choice(PICTURES)
    content = _bomb(chance) if chance.random() < 0.05 else damage(good(case, name), chance)
    shown = "x" + chance.choice((Path(name).suffix, Path(chance.choice(PICTURES)).suffix))
    put(case, shown, content)
    case.place.take("tiny-image")
    given = (
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
    return [(*given, "--dry-run"), (*given, "--dry-run"), (*ROLL, "--image", shown, "--dry-run"),
            (*ROLL, "--image", shown, *LATENTS), ("preview", shown)]  # fmt: skip


def _bomb(chance: random.Random) -> bytes:
    """A picture of 100,000 by 100,000 pixels in some bytes."""
    side = chance.choice((0, 1, 20_000, 100_000, 2**31 - 1, 2**32 - 1))
    header = struct.pack(
        ">IIBBBBB", side, side, chance.choice((1, 8, 16, 99)), chance.choice((0, 2, 3, 7)), 0, 0, 0
    )

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )
