"""Run the ffmpeg of imageio-ffmpeg, feed it frames, and report its errors."""

import errno
import os
import re
import shutil
import signal
import struct
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Literal

from wancli.errors import SetupError

if TYPE_CHECKING:
    from wancli.config.settings import Output

# Only ffmpeg's own messages start like this; a comment that it prints is indented differently.
_FAULT = re.compile(r"^(?:\[[^]]*\] )*\[(?:error|fatal|panic)\] (.*\S)", re.M)

# 4:2:0 needs even sides; untagged video would be shown as BT.601, up to 40/255 off.
# A last filter sets the tags: `scale` does so only from ffmpeg 7.1 on.
_BT709 = "setparams=color_primaries=bt709:color_trc=bt709"
_TO_YUV = (
    "pad=ceil(iw/2)*2:ceil(ih/2)*2,scale=out_color_matrix=bt709:out_range=tv,format=yuv420p,"
    f"{_BT709}:colorspace=bt709:range=tv"
)
_TAG_RGB = f"{_BT709}:colorspace=gbr:range=pc"
# The `colr` box of an MP4: primaries, transfer, matrix, full range.
_COLR_YUV = struct.pack(">8s3HB", b"colrnclx", 1, 1, 1, 0)
_COLR_RGB = struct.pack(">8s3HB", b"colrnclx", 1, 1, 0, 0x80)
# Every frame is on disk as soon as it is encoded, in a file that plays wherever it ends.
LIVE = ["-movflags", "+frag_every_frame+empty_moov+default_base_moof", "-flush_packets", "1"]

# At 832x480 and CRF 18 "medium" encodes 39 frames a second and core, "veryfast" 107, in files of
# the same size: PSNR 42.8 instead of 43.6 dB. "superfast" is hardly faster, and files are larger.
LIVE_PRESET = "veryfast"
_TRIED_FRAMES = 3


def ffmpeg_exe() -> str:
    """The ffmpeg that imageio-ffmpeg ships, or $IMAGEIO_FFMPEG_EXE. Raises SetupError."""
    import imageio_ffmpeg  # pulls in numpy, 0.1 s

    exe: str | None = None
    with suppress(RuntimeError):
        exe = shutil.which(imageio_ffmpeg.get_ffmpeg_exe())
    if exe is None:
        hint = "install ffmpeg, or pip install --force-reinstall imageio-ffmpeg"
        hint += "; unset IMAGEIO_FFMPEG_EXE" if "IMAGEIO_FFMPEG_EXE" in os.environ else ""
        raise SetupError("ffmpeg not found.", hint=hint)
    return exe


def run_ffmpeg(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run ffmpeg in its own session, so that Ctrl-C in the terminal reaches only wancli."""
    return subprocess.run(
        [ffmpeg_exe(), "-hide_banner", "-nostdin", *arguments],
        input=stdin,
        capture_output=True,
        start_new_session=True,
        # Keep SIGXFSZ ignored, as in Python: a file size limit is then an ordinary error.
        restore_signals=False,
        check=False,
    )


def failure_reason(log: bytes, *, returncode: int) -> str:
    """The reason for a failure in a few words, from ffmpeg's log at `level+`."""
    faults = _FAULT.findall(log.decode(errors="replace"))
    known = {os.strerror(number) for number in errno.errorcode}
    tails = [fault.rpartition(": ")[2] for fault in faults]
    if reasons := [tail for tail in tails if tail in known] or faults:
        return str(reasons[0])
    if returncode < 0:
        return f"ffmpeg was killed by {signal.Signals(-returncode).name}"
    return f"ffmpeg stopped with code {returncode}"


def check_written(log: bytes, *, returncode: int) -> None:
    """Raise OSError if ffmpeg could not write, judging by its log at `level+error`.

    Before 7.0 it exits with 0 when the disk is full at the end of a file, and only logs it.
    """
    if returncode or _FAULT.search(log.decode(errors="replace")):
        raise OSError(failure_reason(log, returncode=returncode))


def ffmetadata(metadata: Mapping[str, str]) -> bytes:
    """Metadata as an input of ffmpeg (`-f ffmetadata`). `comment` is last, and exact.

    A backslash before a newline continues the line even if it is itself escaped. So the input ends
    without a newline, and other values that end in a backslash (a prompt as `title`) get a space.
    """
    lines = [";FFMETADATA1"]
    for key, value in sorted(metadata.items(), key=lambda item: item[0] == "comment"):
        end = " " if value.endswith("\\") and key != "comment" else ""
        lines.append(f"{key}=" + re.sub(r"([=;#\\\r\n])", r"\\\1", value) + end)
    return "\n".join(lines).encode()


@dataclass(frozen=True)
class Encoding:
    """An H.264 encoder and its settings."""

    crf: int = 18
    lossless: bool = False
    preset: str = "medium"  # of x264
    encoder: Literal["x264", "nvenc"] = "x264"

    def __str__(self) -> str:
        return f"x264 {self.preset}" if self.encoder == "x264" else self.encoder

    def arguments(self, *, live: bool = False) -> list[str]:
        """The encoder's arguments of an ffmpeg command; `live` holds no frames back."""
        if self.encoder == "nvenc":
            quality = ["-rc", "vbr", "-cq", str(max(self.crf, 1)), "-b:v", "0"]  # 0 is automatic
            now = ["-tune", "ll", "-delay", "0", "-bf", "0"] if live else []
            return ["-vf", _TO_YUV, "-c:v", "h264_nvenc", *quality, *now]
        preset = ["-preset", self.preset, *(["-tune", "zerolatency"] if live else [])]
        if self.lossless:  # RGB 4:4:4: bit-exact at any size
            return ["-vf", _TAG_RGB, "-c:v", "libx264rgb", "-crf", "0", *preset]
        return ["-vf", _TO_YUV, "-c:v", "libx264", "-crf", str(self.crf), *preset]


def choose_encoding(output: "Output", size: tuple[int, int], *, live: bool = False) -> Encoding:
    """The encoding of the output settings for videos of (width, height), which was tried.

    Encodes a few frames, once a process. Raises SetupError.
    """
    preset: str = output.encoder_preset
    if preset == "auto":
        preset = LIVE_PRESET if live else "medium"
    x264 = Encoding(output.crf, output.lossless, preset)
    nvenc = replace(x264, encoder="nvenc")
    exe = ffmpeg_exe()
    if output.encoder == "nvenc" or (output.encoder == "auto" and not output.lossless):
        fault = _encoder_fault(exe, nvenc, size)
        if not fault:
            return nvenc
        if output.encoder == "nvenc":
            raise SetupError(
                f"`encoder` nvenc does not work here: {fault.rstrip('.')}.", hint="`encoder` x264"
            )
    check_encoder(x264)
    return x264


def check_encoder(encoding: Encoding) -> None:
    """Encode a frame with x264, before any model loads. Raises SetupError."""
    exe = ffmpeg_exe()
    if fault := _encoder_fault(exe, encoding, (16, 16)):
        raise SetupError(
            f"ffmpeg cannot encode video: {fault.rstrip('.')} ({exe}).",
            hint="pip install --upgrade imageio-ffmpeg, and unset IMAGEIO_FFMPEG_EXE",
        )


@cache
def _encoder_fault(exe: str, encoding: Encoding, size: tuple[int, int]) -> str:
    """Why an encoder does not work for videos of (width, height); "" if it does."""
    width, height = size
    done = run_ffmpeg(
        *("-v", "level+error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"),
        *("-i", "-", *encoding.arguments(), *LIVE, "-fps_mode", "passthrough", "-f", "mp4"),
        "pipe:1",
        stdin=bytes(_TRIED_FRAMES * width * height * 3),
    )
    if done.returncode and encoding.encoder == "nvenc" and not _knows(b"h264_nvenc"):
        return f"{exe} has no NVENC"  # its own words would be about an option
    if done.returncode:  # the first fault: those after it follow from it
        faults = _FAULT.findall(done.stderr.decode(errors="replace"))
        return str((faults or [failure_reason(b"", returncode=done.returncode)])[0])
    tagged = (_COLR_RGB if encoding.lossless else _COLR_YUV) in done.stdout
    return "" if tagged else "it does not tag colours as BT.709"


def _knows(encoder: bytes) -> bool:
    """Whether ffmpeg lists the encoder, or lists none."""
    listed = run_ffmpeg("-encoders")
    return encoder in listed.stdout or listed.returncode != 0


class Encoder:
    """An ffmpeg process that encodes raw frames. Raises OSError with ffmpeg's reason."""

    def __init__(self, raw: list[str], out: list[str], *, metadata: Mapping[str, str]) -> None:
        command = [ffmpeg_exe(), "-hide_banner", "-v", "level+error", "-y"]
        command += ["-f", "rawvideo", "-pix_fmt", "rgb24", *raw, "-i", "pipe:0"]
        # A file, since an unread pipe would fill up and block ffmpeg.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in stop()
        with tempfile.TemporaryFile() as header:
            header.write(ffmetadata(metadata))
            header.seek(0)
            about = ["-f", "ffmetadata", "-i", f"pipe:{header.fileno()}", "-map_metadata", "1"]
            self._process = subprocess.Popen(
                [*command, *about, "-map", "0:v:0", *out],
                bufsize=0,  # nothing is left to write when stdin closes, so that cannot block
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=self._log,
                pass_fds=[header.fileno()],
                start_new_session=True,  # as in run_ffmpeg
                restore_signals=False,  # as in run_ffmpeg
            )
        assert self._process.stdin is not None  # noqa: S101 - for mypy
        self._stdin = self._process.stdin

    def feed(self, frame: bytes) -> None:
        """Write one frame, rgb24."""
        try:
            left = memoryview(frame)
            while left:
                left = left[self._stdin.write(left) :]
        except BrokenPipeError:
            self.finish()
            raise

    def finish(self) -> None:
        """Close the input and wait until everything is encoded."""
        self._stdin.close()
        code = self._process.wait()
        self._log.seek(0)
        check_written(self._log.read(), returncode=code)

    def kill(self) -> None:
        """Kill ffmpeg; what a thread is feeding it fails. `stop` tidies up."""
        self._process.kill()

    def stop(self, *, patience_s: float) -> None:
        """Kill ffmpeg, after `patience_s` to encode its remaining frames."""
        self._stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(patience_s)
        self._process.kill()
        self._process.wait()
        self._log.close()
