"""Any ffmpeg that passes the check writes the same, correctly tagged frames; others fail it."""

import shutil
from pathlib import Path

import pytest

from tests.video.test_write import smooth, write
from wancli.config.settings import Output
from wancli.errors import SetupError
from wancli.video.ffmpeg import (
    Encoding,
    check_encoder,
    check_written,
    choose_encoding,
    ffmpeg_exe,
    run_ffmpeg,
)

LOSSY, LOSSLESS = Encoding(preset="ultrafast"), Encoding(lossless=True, preset="ultrafast")
LACKS_RGB = """
case "$*" in *libx264rgb*) echo "[fatal] Unknown encoder 'libx264rgb'" >&2; exit 1; esac
"""
NO_NVENC = """
case "$*" in *h264_nvenc*)
    echo "[h264_nvenc @ 0x1] [error] OpenEncodeSessionEx failed: unsupported device (2)" >&2
    echo "[out#0] [error] Task finished: Operation not permitted" >&2; exit 255
esac
"""
WITHOUT_NVENC = """
case "$*" in
    *-encoders*) echo " V....D libx264  H.264"; exit;;
    *h264_nvenc*) echo "[fatal] Unrecognized option 'rc'." >&2; exit 8;;
esac
"""
# Stands for the hardware: x264, by nvenc's arguments.
NVENC = """
set -- "${@/h264_nvenc/libx264}"
set -- "${@/#-rc/-preset}"
set -- "${@/#vbr/ultrafast}"
set -- "${@/#-cq/-crf}"
"""


@pytest.fixture
def wrap_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs lines of bash, which may change the arguments, before the real ffmpeg."""

    def wrap(lines: str) -> None:
        program = tmp_path / "ffmpeg"
        program.write_text(f'#!/bin/bash\n{lines}\nexec {ffmpeg_exe()} "$@"\n')
        program.chmod(0o755)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))

    return wrap


@pytest.mark.parametrize(
    ("lines", "encoding", "reason"),
    [
        ("exit 3", LOSSY, "ffmpeg stopped with code 3"),
        (LACKS_RGB, LOSSLESS, "Unknown encoder 'libx264rgb'"),
        ('set -- "${@/setparams=*/null}"', LOSSY, "it does not tag colours as BT.709"),
        ('set -- "${@/setparams=*/null}"', LOSSLESS, "it does not tag colours as BT.709"),
        ('set -- "${@/-fps_mode/-fps_mode_of_later}"', LOSSY, "Unrecognized option"),
    ],
)
def test_the_check_detects_what_an_encoder_lacks(wrap_ffmpeg, lines, encoding, reason):
    wrap_ffmpeg(lines)
    with pytest.raises(SetupError, match=reason) as caught:
        check_encoder(encoding)
    assert "pip install --upgrade imageio-ffmpeg" in caught.value.hint


def test_only_the_requested_encoding_has_to_work(wrap_ffmpeg):
    wrap_ffmpeg(LACKS_RGB)
    check_encoder(LOSSY)


@pytest.mark.parametrize(
    ("lines", "output", "live", "name"),
    [
        (NVENC, Output(), False, "x264 medium"),
        (NVENC, Output(), True, "x264 veryfast"),
        (NVENC, Output(encoder_preset="slow"), True, "x264 slow"),
        (NVENC, Output(encoder="auto"), False, "nvenc"),
        (NVENC, Output(encoder="nvenc"), False, "nvenc"),
        (NVENC, Output(encoder="auto", lossless=True), False, "x264 medium"),
        (NO_NVENC, Output(encoder="auto"), True, "x264 veryfast"),
    ],
)
def test_hardware_encodes_where_it_is_chosen_and_works(
    wrap_ffmpeg, tmp_path: Path, lines: str, output: Output, name: str, *, live: bool
):
    wrap_ffmpeg(lines)
    encoding = choose_encoding(output, (64, 48), live=live)
    assert write(tmp_path / "a.mp4", smooth(4), encoding=encoding).encoder == name


@pytest.mark.parametrize(
    ("lines", "reason"),
    [(NO_NVENC, "OpenEncodeSessionEx failed: unsup"), (WITHOUT_NVENC, "ffmpeg has no NVENC")],
)
def test_hardware_that_does_not_encode_is_refused_with_the_reason(wrap_ffmpeg, lines, reason):
    wrap_ffmpeg(lines)
    with pytest.raises(SetupError, match=reason) as caught:
        choose_encoding(Output(encoder="nvenc"), (64, 48))
    assert caught.value.hint == "`encoder` x264"


@pytest.mark.parametrize(
    ("encoding", "tags"),
    [
        (LOSSY, "yuv420p(tv, bt709, progressive)"),
        (LOSSLESS, "gbrp(pc, gbr/bt709/bt709, progressive)"),
    ],
)
def test_another_ffmpeg_writes_the_same_frames_and_tags(encoding, tags, tmp_path, monkeypatch):
    frames = smooth(8)
    ours = write(tmp_path / "ours.mp4", frames, encoding=encoding)
    assert tags in run_ffmpeg("-i", f"file:{ours.path}").stderr.decode()
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", shutil.which("ffmpeg") or "")
    try:
        check_encoder(encoding)
    except SetupError:
        pytest.skip("no other ffmpeg that can write videos")
    other = write(tmp_path / "other.mp4", frames, encoding=encoding)
    assert other.framemd5 == ours.framemd5
    assert tags in run_ffmpeg("-i", f"file:{other.path}").stderr.decode()


def test_an_error_with_exit_0_is_still_an_error():
    check_written(b"", returncode=0)
    with pytest.raises(OSError, match="^No space left on device$"):
        check_written(
            b"[error] Error writing trailer of a.mp4: No space left on device\n", returncode=0
        )
