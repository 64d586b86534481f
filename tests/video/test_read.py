import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.video.test_write import QUICK, noise, smooth, write, writer_to
from wancli.errors import InputError, OutputError, SetupError
from wancli.video.ffmpeg import Encoding, failure_reason, ffmpeg_exe, run_ffmpeg
from wancli.video.read import (
    VideoInfo,
    decoded_md5,
    probe,
    read_comment,
    read_frames,
    stream_frames,
)
from wancli.video.write import VideoWriter


def box(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(payload), kind) + payload


def comment_box(text: bytes) -> bytes:
    """The boxes moov/udta/meta/ilst/©cmt/data, as specified."""
    data = box(b"data", struct.pack(">II", 1, 0) + text)
    meta = box(b"meta", bytes(4) + box(b"hdlr", bytes(25)) + box(b"ilst", box(b"\xa9cmt", data)))
    return box(b"moov", box(b"mvhd", bytes(100)) + box(b"udta", meta))


FTYP = box(b"ftyp", b"isom" + bytes(4))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    write(path, smooth(8), comment="a comment")
    return path


def test_probe_returns_size_rate_and_decoded_frames(video: Path) -> None:
    assert probe(video) == VideoInfo(width=64, height=48, fps=16.0, frames=8)


def test_probe_is_not_fooled_by_a_comment(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write(path, smooth(2), comment="x\n  Stream #0:0: Video: h264, 9x9, 99 fps\n[error] no")
    assert probe(path) == VideoInfo(width=64, height=48, fps=16.0, frames=2)


@pytest.mark.parametrize(("fps", "shown"), [(24000 / 1001, 23.98), (12.5, 12.5), (60, 60.0)])
def test_probe_returns_rates_as_ffmpeg_does(tmp_path: Path, fps: float, shown: float) -> None:
    path = tmp_path / "a.mp4"
    with VideoWriter(path, size=(64, 48), fps=fps, encoding=QUICK) as writer:
        writer.write(smooth(3))
        writer.finish({})
    assert probe(path).fps == shown


@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
def test_frames_can_be_read_a_few_at_a_time(video: Path, chunk: int) -> None:
    chunks = list(stream_frames(video, info=probe(video), chunk=chunk))
    assert [len(frames) for frames in chunks[:-1]] == [chunk] * (len(chunks) - 1)
    assert np.array_equal(np.concatenate(chunks), read_frames(video))


def test_stopping_early_does_not_wait_for_ffmpeg(video: Path) -> None:
    stream = stream_frames(video, info=probe(video), chunk=1)
    assert next(stream).shape == (1, 48, 64, 3)
    stream.close()
    assert list(stream) == []


def test_a_video_that_shrinks_while_it_is_read_is_an_error(video: Path) -> None:
    info = replace(probe(video), frames=9)  # it has 8
    with pytest.raises(InputError, match="ends early"):
        list(stream_frames(video, info=info, chunk=2))


def test_frames_are_writable_numpy_arrays(video: Path) -> None:
    frames = read_frames(video)
    assert frames.shape == (8, 48, 64, 3)
    assert frames.dtype == np.uint8
    frames[:] = 0


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("size", [(64, 48), (63, 47)])
def test_lossless_encoding_is_exact_at_any_size(
    tmp_path: Path, size: tuple[int, int], streaming: bool
) -> None:
    frames = noise(width=size[0], height=size[1])
    path = tmp_path / "a.mp4"
    write(path, frames, encoding=Encoding(lossless=True, preset="ultrafast"), streaming=streaming)
    assert np.array_equal(read_frames(path), frames)


def test_equal_frames_have_equal_digests_in_other_files(tmp_path: Path) -> None:
    exact = Encoding(lossless=True, preset="ultrafast")
    plain = write(tmp_path / "a.mp4", noise(), encoding=exact, comment="one")
    streamed = write(tmp_path / "b.mp4", noise(), encoding=exact, comment="two", streaming=True)
    other = write(tmp_path / "c.mp4", smooth(), encoding=exact)
    assert plain.path.read_bytes() != streamed.path.read_bytes()
    assert plain.framemd5 == streamed.framemd5 != other.framemd5


def test_colours_are_tagged_bt709_and_survive_within_three_levels(tmp_path: Path) -> None:
    path, frames = tmp_path / "a.mp4", smooth(8)
    write(path, frames, encoding=Encoding(crf=1))
    log = run_ffmpeg("-i", f"file:{path}").stderr.decode()
    error = np.abs(read_frames(path).astype(int) - frames).max()
    assert "yuv420p(tv, bt709, progressive)" in log
    assert error <= 3, f"max error {error}/255"


def test_an_odd_size_is_padded_to_even(tmp_path: Path) -> None:
    path, frames = tmp_path / "a.mp4", smooth(width=63, height=47)
    write(path, frames, encoding=Encoding(crf=1))
    back = read_frames(path)
    assert back.shape == (4, 48, 64, 3)
    error = np.abs(back[:, :40, :56].astype(int) - frames[:, :40, :56]).max()
    assert error <= 3, f"max error {error}/255 away from the pad, which is black and bleeds"


@pytest.mark.parametrize(
    "comment",
    [
        "",
        "  a=b; c#d \\ e\tline\r\n;comment\n[CHAPTER]\nSTART=1\nFünf Wölfe 五匹の狼 🐺 \\",
        '{"prompt": "' + "wolf=; \\n" * 3500 + '"}\n  ',
    ],
)
def test_any_comment_survives_a_round_trip(tmp_path: Path, comment: str) -> None:
    path = tmp_path / "a.mp4"
    with writer_to(path) as writer:
        writer.write(smooth(1))
        writer.finish({"title": "a prompt \\", "comment": comment})
    assert (read_comment(path) or "") == comment


def test_the_modules_import_neither_torch_nor_numpy() -> None:
    program = (
        "import sys, wancli.video.write; sys.exit(bool({'numpy', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("text", ["", "plain", "Wölfe 🐺"])
def test_a_comment_is_read_from_its_specified_box(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(FTYP + box(b"mdat", bytes(50)) + comment_box(text.encode()))
    assert read_comment(path) == text


def test_frame_data_is_skipped_unread(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    huge = 2**40  # a sparse file: reading it would take all memory
    with path.open("wb") as file:
        file.write(FTYP + struct.pack(">I4sQ", 1, b"mdat", 16 + huge))
        file.seek(huge, 1)
        file.write(comment_box(b"after a terabyte"))
    assert read_comment(path) == "after a terabyte"


def test_a_video_without_a_comment_has_none(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write(path, smooth(1), comment="")
    assert read_comment(path) is None


@pytest.mark.parametrize(
    "moov",
    [
        box(b"moov", b""),
        box(b"moov", box(b"udta", b"abc")),
        box(b"moov", struct.pack(">I4s", 2**31, b"udta")),
        box(b"moov", struct.pack(">I4s", 3, b"udta") + bytes(40)),
        box(b"moov", box(b"udta", box(b"meta", b"\0"))),
        comment_box(b"text").replace(b"\x14data", b"\xffdata"),
    ],
)
def test_a_malformed_index_has_no_comment(tmp_path: Path, moov: bytes) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(FTYP + moov)
    assert not read_comment(path)


@pytest.mark.parametrize("content", [b"", b"short", b"just some text, longer", bytes(64)])
def test_another_kind_of_file_is_reported_as_such(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is not an MP4 file"):
        read_comment(path)
    for read in (probe, read_frames):
        with pytest.raises(InputError, match="cannot read "):
            read(path)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.6, 0.99])
def test_a_truncated_video_is_an_error_not_a_shorter_video(
    video: Path, tmp_path: Path, share: float
) -> None:
    content = video.read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(content[: int(len(content) * share)])
    for read in (probe, read_frames):
        with pytest.raises(InputError):
            read(path)


def test_a_truncated_index_is_an_error_and_truncated_frames_leave_the_comment(
    video: Path, tmp_path: Path
) -> None:
    content = video.read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(content[: content.index(b"\xa9cmt")])
    with pytest.raises(InputError, match="truncated"):
        read_comment(path)
    path.write_bytes(content[:-10])
    assert read_comment(path) == "a comment"


def test_a_video_that_starts_after_its_end_has_no_frames(video: Path, tmp_path: Path) -> None:
    content, path = bytearray(video.read_bytes()), tmp_path / "a.mp4"
    first = content.index(b"elst") + 16  # the first media time, after version, count and duration
    content[first : first + 4] = b"\x7f\xff\xff\xff"
    path.write_bytes(content)
    for read in (probe, read_frames, decoded_md5):
        with pytest.raises(InputError, match="holds no video frames"):
            read(path)


def test_a_missing_video_suggests_a_similar_name(video: Path) -> None:
    for read in (probe, read_frames, read_comment):
        with pytest.raises(InputError, match="not found") as caught:
            read(video.with_name("a.mpg"))
        assert caught.value.hint == f"did you mean {str(video)!r}?"
    with pytest.raises(InputError, match="it is a folder"):
        read_comment(video.parent)


def test_a_missing_ffmpeg_is_a_setup_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/no/ffmpeg")
    with pytest.raises(SetupError, match="ffmpeg not found"):
        ffmpeg_exe()
    with pytest.raises(OutputError, match="ffmpeg not found"):  # the frames can still be saved
        writer_to(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    ("log", "code", "reason"),
    [
        (b"[mp4 @ 0x1] [error] muxing\n[error] a: File too large\n", 228, "File too large"),
        (b"[info] fine\n[mov @ 0x1] [error] moov atom not found\n", 183, "moov atom not found"),
        (b"", -9, "ffmpeg was killed by SIGKILL"),
        (b"[info] no message\n", 5, "ffmpeg stopped with code 5"),
    ],
)
def test_an_ffmpeg_failure_is_described_in_a_few_words(log: bytes, code: int, reason: str) -> None:
    assert failure_reason(log, returncode=code) == reason


@pytest.mark.parametrize(
    ("options", "square", "hdr"),
    [
        (("-vf", "setsar=16/11"), False, False),
        (("-vf", "setsar=64/64"), True, False),
        (("-vf", "setparams=color_trc=arib-std-b67"), True, True),
        (("-vf", "setparams=color_trc=smpte2084"), True, True),
        (("-vf", "setparams=color_trc=bt709"), True, False),
    ],
)
def test_the_shape_of_pixels_and_hdr_are_seen(
    video: Path, tmp_path: Path, options: tuple[str, ...], square: bool, hdr: bool
):
    run_ffmpeg("-i", str(video), *options, "-c:v", "libx264", str(tmp_path / "b.mkv"))
    info = probe(tmp_path / "b.mkv")
    assert (info.square, info.hdr) == (square, hdr)
