"""Read videos: their record, size, length and frames. Imports no numpy at the top."""

import hashlib
import os
import re
import shlex
import struct
import subprocess
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from wancli.errors import InputError, missing
from wancli.utils.outputs import stream_part
from wancli.utils.reading import open_file, unreadable
from wancli.video.ffmpeg import failure_reason, ffmpeg_exe, run_ffmpeg

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Boxes that an MP4 may start with.
_FIRST_BOXES = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp"}
_LARGEST_COMMENT = 16 * 2**20
_CUT_HINT = "its writing was interrupted; make it again, or copy it again"

# Only ffmpeg's own messages start like this; a comment that it prints is indented differently.
_STREAM = re.compile(
    r"^\[info\]   Stream #.*?: Video: (?P<format>.*?), (?P<width>\d+)x(?P<height>\d+)"
    r"(?: \[SAR (?P<wide>\d+):(?P<high>\d+) .*?\])?[ ,].*?(?P<fps>[\d.]+) fps",
    re.M,
)
_HDR = ("smpte2084", "arib-std-b67")  # transfer functions: PQ and HLG

# Without these flags, upsampling chroma repeats samples (an error of 7 levels, not 3).
_SCALE = "scale=flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
_RGB = ("-vf", _SCALE, "-f", "rawvideo", "-pix_fmt", "rgb24")


@dataclass(frozen=True)
class VideoInfo:
    """Size in pixels, frame rate (as ffmpeg prints it, two decimals), and number of frames."""

    width: int
    height: int
    fps: float
    frames: int
    square: bool = True  # whether its pixels are
    hdr: bool = False  # whether it has a high dynamic range, which is not mapped to a normal one


def probe(path: Path) -> VideoInfo:
    """Size, rate and length, counted by decoding everything. Raises InputError."""
    done = _decode(path, "-f", "framemd5")
    info = _stream(path, done)
    return replace(info, frames=len(_hashes(path, done)))


def read_frames(path: Path) -> "NDArray[np.uint8]":
    """Read all video frames, uint8 [T, H, W, 3], by their colour tags. Raises InputError."""
    import numpy as np

    done = _decode(path, *_RGB)
    info = _stream(path, done)
    # torch.from_numpy needs a writable array.
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, info.height, info.width, 3).copy()


def stream_frames(
    path: Path, *, info: VideoInfo, chunk: int
) -> Generator["NDArray[np.uint8]", None, None]:
    """Read the video frames of a probed video, `chunk` at a time, uint8 [T, H, W, 3].

    Raises InputError.
    """
    import numpy as np

    left, size = info.frames, info.height * info.width * 3
    command = [ffmpeg_exe(), "-hide_banner", "-nostdin", *_decoding(path, *_RGB)]
    # No log: probe() has decoded everything, and reported errors.
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # as in run_ffmpeg
    ) as process:
        assert process.stdout is not None  # noqa: S101 - for mypy
        try:
            while left:
                count = min(chunk, left)
                if len(data := process.stdout.read(count * size)) < count * size:
                    raise InputError(f"{path} ends early.", hint="is it being written? try again")
                left -= count
                yield np.frombuffer(data, np.uint8).reshape(-1, info.height, info.width, 3).copy()
        finally:
            process.kill()  # the caller may stop early


def decoded_md5(path: Path) -> tuple[int, str]:
    """Number of decoded video frames, and one MD5 over their MD5s. Raises InputError."""
    hashes = _hashes(path, _decode(path, "-f", "framemd5"))
    return len(hashes), hashlib.md5("\n".join(hashes).encode(), usedforsecurity=False).hexdigest()


def read_comment(path: Path) -> str | None:
    """The `comment` of an MP4, finished or killed while streaming; None without one.

    Reads a few headers, never the frames. Raises InputError for a file that is missing, is not an
    MP4, or lost its index.
    """
    start, text = find_comment(path)
    return text.decode(errors="replace") if start else None


def find_comment(path: Path) -> tuple[int, bytes]:
    """Offset of the comment's text in the file, and its bytes; 0 without one. Raises InputError."""
    with _open(path) as file:
        boxes = _top_boxes(file)
        if not boxes or boxes[0].kind not in _FIRST_BOXES:
            raise InputError(f"{path} is not an MP4 file.", hint="give an .mp4 that wancli wrote")
        moov = next((box for box in boxes if box.kind == b"moov"), None)
        if moov is None or moov.end > _size(file):
            raise InputError(f"{path} is truncated: its index is missing.", hint=_CUT_HINT)
        data = _inside(file, moov, (b"udta", b"meta", b"ilst", b"\xa9cmt", b"data"))
        if data is None or not 8 <= data.end - data.start <= _LARGEST_COMMENT:
            return 0, b""
        start = data.start + 8  # past the type and the locale
        file.seek(start)
        return start, file.read(data.end - start)


def packets_sha256(path: Path) -> str:
    """SHA-256 of the encoded packets: the output of `ffmpeg -i PATH -c copy -f hash -`.

    For a file with one stream and contiguous packets, finished or streamed. Survives a copy of the
    stream into another MP4. Raises InputError.
    """
    digest = hashlib.sha256()
    with _open(path) as file:
        for box in _top_boxes(file):
            if box.kind == b"mdat":
                file.seek(box.start)
                update(digest, file, box.end - box.start)
    return digest.hexdigest()


def update(digest: "hashlib._Hash", file: BinaryIO, count: int | None = None) -> None:
    """Feed a digest with `count` bytes of a file, or with the rest."""
    left = _size(file) if count is None else count
    while block := file.read(min(left, 2**20)):
        digest.update(block)
        left -= len(block)


def streamed_frames(path: Path) -> int:
    """Number of video frames in the fragments of a streamed file, finished or not; 0 in others.

    Reads headers, never the frames. Raises InputError.
    """
    count = 0
    with _open(path) as file:
        for box, data in pairwise(_top_boxes(file)):
            run = _inside(file, box, (b"traf", b"trun")) if box.kind == b"moof" else None
            if run and data.end <= _size(file):  # else it was cut while its frames were written
                file.seek(run.start + 4)  # past the version and flags
                count += int.from_bytes(file.read(4), "big")
    return count


def holds_fragments(path: Path) -> bool:
    """Whether a streamed file holds its first video frame, and so plays."""
    try:
        with open_file(path) as file:
            return any(box.kind == b"moof" for box in _top_boxes(file))
    except OSError:
        return False


def _decode(path: Path, *output: str) -> subprocess.CompletedProcess[bytes]:
    """Decode every video frame to stdout by the arguments `output`; info log on stderr."""
    _check_complete(path)
    done = run_ffmpeg(*_decoding(path, *output))
    if done.returncode:
        reason = failure_reason(done.stderr, returncode=done.returncode)
        raise InputError(f"cannot read {path}: {reason}", hint="give a video that ffmpeg can play")
    return done


def _decoding(path: Path, *output: str) -> list[str]:
    """ffmpeg's arguments for decoding."""
    source = ["-v", "level+info", "-fflags", "+discardcorrupt", "-i", f"file:{path.absolute()}"]
    mapping = ["-map", "0:v:0", "-map_metadata", "-1", "-fps_mode", "passthrough"]
    return [*source, *mapping, *output, "pipe:1"]


def _stream(path: Path, done: subprocess.CompletedProcess[bytes]) -> VideoInfo:
    """What was decoded, its frames uncounted: ffmpeg names its output stream last."""
    streams = list(_STREAM.finditer(done.stderr.decode(errors="replace")))
    if not streams or not done.stdout:
        raise InputError(f"{path} holds no video frames.", hint=_CUT_HINT)
    last = streams[-1]
    if not float(last["fps"]):
        raise InputError(f"{path} has no frame rate.", hint=_CUT_HINT)
    wide, high = (int(last[side] or 1) for side in ("wide", "high"))
    return VideoInfo(
        int(last["width"]),
        int(last["height"]),
        float(last["fps"]),
        frames=0,
        square=100 * abs(wide - high) <= high,  # ratios are rounded
        hdr=any(transfer in last["format"] for transfer in _HDR),
    )


def _hashes(path: Path, done: subprocess.CompletedProcess[bytes]) -> list[str]:
    """The MD5 of each video frame. Raises InputError without frames."""
    lines = [line for line in done.stdout.decode().splitlines() if line and line[0] != "#"]
    if not lines:
        raise InputError(f"{path} holds no video frames.", hint=_CUT_HINT)
    return [line.rpartition(",")[2].strip() for line in lines]


def _check_complete(path: Path) -> None:
    """Raise InputError for a truncated MP4, of which ffmpeg would silently decode fewer frames.

    Passes a fragmented file that was killed while streaming.
    """
    with _open(path) as file:
        boxes = _top_boxes(file)
        kinds = {box.kind for box in boxes}
        plain = bool(boxes) and boxes[0].kind == b"ftyp" and b"moof" not in kinds
        if plain and (b"moov" not in kinds or boxes[-1].end > _size(file)):
            raise InputError(f"{path} is truncated.", hint=_CUT_HINT)


def _open(path: Path) -> BinaryIO:
    try:
        return open_file(path)
    except FileNotFoundError:
        raise _unfinished(path) or missing("video", path) from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error, hint="give a file you can read") from error


def _unfinished(path: Path) -> InputError | None:
    """Error for the video of a rollout that was interrupted, which can be resumed."""
    part = stream_part(path)
    if not part.exists() or not path.with_suffix(".rollout").is_dir():
        return None
    return InputError(
        f"video '{path}' not found: its rollout is not finished.",
        hint=f"watch {part}, or finish it: wancli rollout `resume` -o {shlex.quote(str(path))}",
    )


@dataclass(frozen=True)
class _Box:
    """One box of an MP4: offsets of its payload's start and claimed end."""

    kind: bytes
    start: int
    end: int


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[_Box]:
    """The boxes between two offsets, up to the first invalid one."""
    while start + 8 <= end:
        file.seek(start)
        size, kind = struct.unpack(">I4s", file.read(8))
        head = 8
        if size == 1 and start + 16 <= end:  # 64-bit size
            size, head = struct.unpack(">Q", file.read(8))[0], 16
        elif size == 0:  # extends to the end
            size = end - start
        if size < head:
            return
        yield _Box(kind, start + head, start + size)
        start += size


def _top_boxes(file: BinaryIO) -> list[_Box]:
    return list(_boxes(file, 0, _size(file)))


def _inside(file: BinaryIO, box: _Box, names: tuple[bytes, ...]) -> _Box | None:
    """The box at a path of names, if it lies entirely within the others."""
    for name in names:
        start = box.start + (4 if box.kind == b"meta" else 0)  # meta has a version and flags
        inner = next((b for b in _boxes(file, start, box.end) if b.kind == name), None)
        if inner is None or inner.end > box.end:
            return None
        box = inner
    return box


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size
