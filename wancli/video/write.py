"""Write videos atomically: a file under its final name is complete and verified."""

import errno
import os
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from wancli.errors import InputError, OutputError, SetupError, UsageError
from wancli.utils.files import part_name, place, remove
from wancli.utils.interrupts import uninterrupted, unwind_from_here
from wancli.utils.outputs import check_length, stream_part
from wancli.video import read
from wancli.video.ffmpeg import LIVE, Encoder, Encoding, check_written, ffmetadata, run_ffmpeg
from wancli.video.integrity import UNSEALED, seal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SHOW_WITHIN_S = 1.0  # after the first frames; otherwise with the next ones

_ADVICE = {
    os.strerror(errno.ENOSPC): "free some space, or use another disk: `output_dir` DIR",
    os.strerror(errno.ENAMETOOLONG): "use a shorter name: `output NAME.mp4`",
}
_ANY_ADVICE = "run the same command again, or use another place: `output_dir` DIR"


@dataclass(frozen=True)
class WrittenVideo:
    """A verified file: bytes on disk, video frames, seconds, and the digests of integrity.py."""

    path: Path
    bytes: int
    frames: int
    duration_s: float
    framemd5: str
    packets_sha256: str
    file_sha256: str
    encoder: str  # and its preset

    def as_json(self) -> dict[str, Any]:
        """The output section of a record."""
        fields = {"path": str(self.path), "duration_s": round(self.duration_s, 3)}
        return {**asdict(self), **fields, "complete": True}


def framemd5(path: Path) -> str:
    """One MD5 over those of all decoded video frames: equal if the frames are. Raises InputError.

    Only the last column of `-f framemd5` counts, not frame rates and containers.
    """
    return read.decoded_md5(path)[1]


def check_name(path: Path) -> None:
    """Raise UsageError for a name that is not valid for a video."""
    if path.suffix.lower() != ".mp4":
        better = path / "out.mp4" if path.is_dir() else path.with_suffix(".mp4")
        raise UsageError(f"output {str(path)!r} does not end in .mp4.", hint=f"use {better}")
    check_length(path)


def check_destination(path: Path) -> None:
    """Create the folder, and try to write to it.

    Raises UsageError for an invalid name, OutputError for an unwritable folder.
    """
    check_name(path)
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder", hint=f"use {path / 'out.mp4'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # More reliable than mode bits: root ignores them, and disks can be read-only.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _failure(path, error) from error


class VideoWriter:
    """Writes video frames to one MP4:

        with VideoWriter(path, size=(832, 480), fps=16, encoding=Encoding()) as writer:
            writer.write(frames)
            record["output"] = writer.digests()
            written = writer.finish({"comment": json.dumps(record)})

    A record is complete only after the last frame, but ffmpeg reads metadata at the start. So
    frames go into a part file, which `finish` copies, with the metadata, to a second one, verifies,
    seals and renames. Leaving the block without `finish` aborts.

    The part is hidden, and removed on failure. With `streaming` it becomes NAME.part.mp4 after the
    first frames: it has `metadata`, can be watched as it grows, survives any kill, and is kept by
    aborts and failures. An existing file with either name is an error, unless its path is in
    `replaced`.
    """

    def __init__(  # noqa: PLR0913 - all properties of a video file
        self,
        path: Path,
        *,
        size: tuple[int, int],
        fps: float,
        encoding: Encoding,
        replaced: Collection[Path] = (),
        streaming: bool = False,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Start ffmpeg. `size` is (width, height) in pixels. Raises OutputError."""
        self.path, self.size, self.fps, self.streaming = path, size, fps, streaming
        self._replaced, self._encoding = replaced, str(encoding)
        unwind_from_here()
        self.frames = 0
        self._packets = ""  # their digest, after the last frame
        self._closed = False
        self._final = path.absolute()  # the process may change its folder
        self._part, self._whole = part_name(self._final), part_name(self._final)
        try:
            check_destination(path)
            with uninterrupted():  # an ffmpeg that nobody knows of would write on
                self._encoder = Encoder(
                    ["-s", f"{size[0]}x{size[1]}", "-r", str(fps)],
                    [
                        *encoding.arguments(live=streaming),
                        *(LIVE if streaming else []),
                        "-f",
                        "mp4",
                        f"file:{self._part}",
                    ],
                    metadata=metadata or {},
                )
        except (SetupError, UsageError) as error:
            # Frames may have cost hours; callers catch OutputError to save them.
            raise OutputError(str(error), hint=error.hint) from error
        except OSError as error:
            raise _failure(path, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def write(self, frames: "NDArray[np.uint8]") -> None:
        """Append video frames, uint8 [T, H, W, 3]. Raises OutputError once ffmpeg has failed."""
        expected = (*self.size[::-1], 3)
        if frames.dtype != "uint8" or frames.shape[1:] != expected:
            raise ValueError(f"frames {frames.dtype} {frames.shape} are not uint8 [T, *{expected}]")
        with self._reporting():
            for frame in frames:
                self._encoder.feed(frame.tobytes())
                self.frames += 1
            if self.streaming:
                self._show_part()

    def digests(self) -> dict[str, str]:
        """The digests for the record, after the last frame. Raises OutputError.

        `finish` replaces the placeholder for that of the file.
        """
        with self._reporting():
            if not self.frames:
                raise OSError("there are no video frames")
            if not self._packets:
                self._encoder.finish()
                if self.streaming:
                    self._shows_part()  # replaces the part of an earlier run
                self._packets = read.packets_sha256(self._part)
        return {"packets_sha256": self._packets, "file_sha256": UNSEALED}

    def finish(self, metadata: Mapping[str, str]) -> WrittenVideo:
        """Verify the video and move it to its final name, with `metadata`. Raises OutputError."""
        packets = self.digests()["packets_sha256"]
        with self._reporting():
            _copy(self._part, self._whole, metadata=metadata)
            if read.packets_sha256(self._whole) != packets:
                raise OSError("its packets do not read back as they were encoded")
            md5 = _verify(self._whole, frames=self.frames, comment=metadata.get("comment", ""))
            size, digest = self._whole.stat().st_size, seal(self._whole)
            _sync(self._whole)
            place(self._whole, self._final, overwrite=self.path in self._replaced)
        self._closed = True
        self._encoder.stop(patience_s=0.0)
        remove(self._part)
        with suppress(OSError):  # some network disks cannot sync a folder; the file is safe
            _sync(self._final.parent)
        seconds = self.frames / self.fps
        return WrittenVideo(
            self.path, size, self.frames, seconds, md5, packets, digest, self._encoding
        )

    def kill(self) -> None:
        """Kill ffmpeg, so that a thread that waits in `write` fails. Call `abort` afterwards."""
        self._encoder.kill()

    def abort(self) -> None:
        """Stop ffmpeg within a second, leaving the final name untouched. Safe to call again."""
        if self._closed:
            return
        self._closed = True
        # ffmpeg still holds a few frames, which a part that is kept should include.
        self._encoder.stop(patience_s=0.5 if self.streaming else 0.0)
        remove(self._whole)
        with suppress(OSError):
            if self.streaming and self._shows_part():
                return
        remove(self._part)

    def _shows_part(self) -> bool:
        """Whether the part is at NAME.part.mp4; moves it there once it plays."""
        shown = stream_part(self._final)
        if self._part == shown:
            return True
        if not read.holds_fragments(self._part):
            return False
        overwrite = stream_part(self.path) in self._replaced
        place(self._part, shown, overwrite=overwrite)  # ffmpeg keeps writing to it
        self._part = shown
        return True

    def _show_part(self) -> None:
        until = time.monotonic() + _SHOW_WITHIN_S
        # A fragment is complete once the next frame is encoded.
        while not self._shows_part() and self.frames > 1 and time.monotonic() < until:
            time.sleep(0.005)

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Abort on any error in the block, and raise it as OutputError."""
        if self._closed:
            raise ValueError("this writer is closed")
        try:
            yield
        except (OSError, InputError) as error:
            self.abort()
            raise _failure(self.path, error, part=self._part) from error


def _copy(part: Path, whole: Path, *, metadata: Mapping[str, str]) -> None:
    """Copy the encoded stream of `part` with its index in front and `metadata`."""
    done = run_ffmpeg(
        *("-v", "level+error", "-y", "-i", f"file:{part}"),
        *("-f", "ffmetadata", "-i", "pipe:0", "-map", "0:v:0", "-map_metadata", "1"),
        *("-c", "copy", "-movflags", "+faststart", "-f", "mp4", f"file:{whole}"),
        stdin=ffmetadata(metadata),
    )
    check_written(done.stderr, returncode=done.returncode)


def _verify(whole: Path, *, frames: int, comment: str) -> str:
    """Read a file back and return its `framemd5`. Raises OSError if anything is missing."""
    decoded, md5 = read.decoded_md5(whole)
    if decoded != frames:
        raise OSError(f"only {decoded} of {frames} video frames read back")
    if (read.read_comment(whole) or "") != comment:
        raise OSError("its record does not read back as it was written")
    return md5


def _failure(path: Path, error: Exception, *, part: Path | None = None) -> OutputError:
    """One line with the reason; the hint names the part if one was left."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    hint = _ADVICE.get(reason, _ANY_ADVICE)
    if part and part.exists():
        hint = f"{hint}; what was written plays: {path.with_name(part.name)}"
    return OutputError(f"cannot write {path}: {reason}", hint=hint)


def _sync(path: Path) -> None:
    """fsync a file or folder; reports a full quota or a failing disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
