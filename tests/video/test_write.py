import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wancli.errors import OutputError, UsageError
from wancli.video.ffmpeg import Encoding
from wancli.video.integrity import file_sha256
from wancli.video.read import packets_sha256, probe, read_comment, read_frames, streamed_frames
from wancli.video.write import VideoWriter, WrittenVideo, check_destination, framemd5

QUICK = Encoding(preset="ultrafast")


def smooth(count: int = 4, *, width: int = 64, height: int = 48) -> np.ndarray:
    """Slow gradients that drift, uint8 [T, H, W, 3]."""
    t, y, x = np.mgrid[0:count, 0:height, 0:width]
    channels = (80 + x + t, 60 + y + 2 * t, 180 - x / 2 - y / 2)
    return np.stack(channels, -1).astype(np.uint8)


def noise(count: int = 4, *, width: int = 64, height: int = 48) -> np.ndarray:
    generator = np.random.default_rng(7)
    return generator.integers(0, 256, (count, height, width, 3), np.uint8)


def writer_to(
    path: Path,
    *,
    size: tuple[int, int] = (64, 48),
    encoding: Encoding = QUICK,
    streaming: bool = False,
    comment: str = "",
    replaced: Collection[Path] = (),
) -> VideoWriter:
    return VideoWriter(
        path, size=size, fps=16, encoding=encoding, streaming=streaming, replaced=replaced,
        metadata={"comment": comment},
    )  # fmt: skip


def write(
    path: Path,
    frames: np.ndarray,
    *,
    encoding: Encoding = QUICK,
    streaming: bool = False,
    comment: str = "{}",
    replaced: Collection[Path] = (),
) -> WrittenVideo:
    size = (frames.shape[2], frames.shape[1])
    with writer_to(
        path, size=size, encoding=encoding, streaming=streaming, replaced=replaced
    ) as writer:
        writer.write(frames)
        return writer.finish({"comment": comment})


def ffmpeg_of(writer: VideoWriter) -> int:
    return writer._encoder._process.pid


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 64 KB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk takes root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_written_video_is_verified_and_alone_in_its_folder(
    tmp_path: Path, streaming: bool
) -> None:
    path = tmp_path / "new" / "folder" / "a.mp4"
    written = write(path, smooth(8), streaming=streaming, comment='{"seed": 7}')
    digests = packets_sha256(path), file_sha256(path)
    facts = (path.stat().st_size, 8, 0.5, framemd5(path), *digests, str(QUICK))
    assert written == WrittenVideo(path, *facts)
    assert read_comment(path) == '{"seed": 7}'
    assert names(path.parent) == ["a.mp4"]


def test_frames_can_be_written_in_pieces(tmp_path: Path) -> None:
    frames = smooth(6)
    with writer_to(tmp_path / "pieces.mp4") as writer:
        for start in range(0, 6, 2):
            writer.write(frames[start : start + 2])
        pieces = writer.finish({})
    assert pieces.framemd5 == write(tmp_path / "whole.mp4", frames).framemd5


@pytest.mark.parametrize("name", ["cat: %d\n'\"*ü🐺.MP4", "-rf.mp4"])
def test_special_names_work(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written = write(Path(name), smooth(2))
    assert names(tmp_path) == [name]
    assert written.framemd5 == framemd5(Path(name))


@pytest.mark.parametrize(("letter", "streaming"), [("a", False), ("狼", True)])
def test_a_name_may_be_255_bytes_long(tmp_path: Path, letter: str, streaming: bool) -> None:
    stem = letter * (251 // len(letter.encode()))
    path = tmp_path / f"{stem:x<{251 - len(stem.encode()) + len(stem)}}.mp4"
    assert len(os.fsencode(path.name)) == 255
    write(path, smooth(2), streaming=streaming)
    assert names(tmp_path) == [path.name]


def test_a_name_of_256_bytes_is_rejected_before_anything_is_encoded(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 252 + ".mp4")
    with pytest.raises(UsageError, match="256 bytes"):
        check_destination(path)
    with pytest.raises(OutputError, match="256 bytes"):
        writer_to(path)
    assert names(tmp_path) == []


def test_an_impossible_destination_is_rejected_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"does not end in \.mp4"):
        check_destination(tmp_path / "a.webm")
    with pytest.raises(OutputError, match="is a folder"):
        check_destination(tmp_path / "folder.mp4")
    with pytest.raises(OutputError, match="cannot write .*/a.mp4: (Not a directory|File exists)"):
        check_destination(tmp_path / "file" / "a.mp4")
    with pytest.raises(OutputError, match="cannot write /proc/none/a.mp4: "):
        check_destination(Path("/proc/none/a.mp4"))
    check_destination(tmp_path / "new" / "a.mp4")
    assert names(tmp_path / "new") == []


def test_a_read_only_disk_is_rejected(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OutputError, match=r"a\.mp4: Read-only file system$"):
        check_destination(small_disk / "a.mp4")


def test_a_full_disk_is_one_line_with_a_hint_and_leaves_nothing(small_disk: Path) -> None:
    with pytest.raises(OutputError) as caught:
        write(small_disk / "a.mp4", noise(12, width=128, height=128))
    assert str(caught.value) == f"cannot write {small_disk / 'a.mp4'}: No space left on device"
    assert "free some space" in caught.value.hint
    assert names(small_disk) == []


def test_a_full_disk_while_streaming_leaves_the_part_that_plays(small_disk: Path) -> None:
    frames = noise(12, width=128, height=128)
    with pytest.raises(OutputError, match="No space left on device") as caught:
        write(small_disk / "a.mp4", frames, streaming=True)
    assert f"plays: {small_disk / 'a.part.mp4'}" in caught.value.hint
    assert names(small_disk) == ["a.part.mp4"]
    assert 0 < probe(small_disk / "a.part.mp4").frames < 12


def test_a_file_size_limit_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    program = """
        import resource, sys
        from pathlib import Path
        from tests.video.test_write import noise, write
        from wancli.errors import OutputError
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            write(Path(sys.argv[1]), noise(12, width=128, height=128))
        except OutputError as error:
            sys.stdout.write(str(error))
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "a.mp4")]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert process.stdout == f"cannot write {tmp_path / 'a.mp4'}: File too large"
    assert names(tmp_path) == []


def test_an_ffmpeg_that_dies_while_writing_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with writer_to(tmp_path / "a.mp4") as writer:
        writer.write(noise())
        os.kill(ffmpeg_of(writer), signal.SIGKILL)
        more = np.tile(noise(), (10, 1, 1, 1))  # more than a pipe holds
        with pytest.raises(OutputError, match="ffmpeg was killed by SIGKILL"):
            writer.write(more)
        assert names(tmp_path) == []


def test_an_ffmpeg_that_dies_while_finishing_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with writer_to(tmp_path / "a.mp4") as writer:
        writer.write(noise())
        os.kill(ffmpeg_of(writer), signal.SIGKILL)
        with pytest.raises(OutputError, match="ffmpeg was killed by SIGKILL"):
            writer.finish({})
        assert names(tmp_path) == []


def test_an_abort_is_quick_and_leaves_nothing(tmp_path: Path) -> None:
    with writer_to(tmp_path / "a.mp4") as writer:
        writer.write(noise())
        os.kill(ffmpeg_of(writer), signal.SIGSTOP)  # the worst case: it does not react
        start = time.monotonic()
        writer.abort()
        assert time.monotonic() - start < 1
        assert names(tmp_path) == []
    with pytest.raises(ValueError, match="closed"):
        writer.finish({})


def test_leaving_without_finish_aborts_and_keeps_the_error(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"older")

    def interrupted() -> None:
        with writer_to(tmp_path / "a.mp4") as writer:
            writer.write(noise())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"older"


def test_ctrl_c_in_the_terminal_does_not_reach_ffmpeg(tmp_path: Path) -> None:
    with writer_to(tmp_path / "a.mp4") as writer:
        assert os.getsid(ffmpeg_of(writer)) != os.getsid(0)


def test_an_existing_file_stays_until_the_new_one_is_verified(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"older")
    with writer_to(path, replaced=[path]) as writer:
        writer.write(smooth())
        assert path.read_bytes() == b"older"
        with pytest.raises(OutputError, match="does not read back as it was written"):
            writer.finish({"comment": "no file keeps a \0 byte"})
    assert path.read_bytes() == b"older"
    assert names(tmp_path) == ["a.mp4"]
    write(path, smooth(), replaced=[path])
    assert probe(path).frames == 4


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_that_appears_during_encoding_stays(tmp_path: Path, streaming: bool) -> None:
    path = tmp_path / "a.mp4"
    with writer_to(path, streaming=streaming) as writer:
        writer.write(smooth())
        path.write_bytes(b"mine")
        with pytest.raises(OutputError, match=r"a\.mp4: File exists"):
            writer.finish({})
    assert path.read_bytes() == b"mine"
    assert names(tmp_path) == (["a.mp4", "a.part.mp4"] if streaming else ["a.mp4"])


def test_only_a_part_of_ours_is_replaced(tmp_path: Path) -> None:
    path, part = tmp_path / "a.mp4", tmp_path / "a.part.mp4"
    part.write_bytes(b"mine")
    with writer_to(path, streaming=True) as writer, pytest.raises(OutputError, match="File exists"):
        writer.write(smooth())
    assert part.read_bytes() == b"mine"
    with writer_to(path, streaming=True, replaced=[part]) as writer:
        writer.write(smooth())
        assert part.stat().st_size > 10
        writer.finish({})
    assert names(tmp_path) == ["a.mp4"]


def test_frames_of_another_size_or_dtype_are_rejected(tmp_path: Path) -> None:
    with writer_to(tmp_path / "a.mp4") as writer:
        floats: Any = smooth().astype(np.float32)
        for wrong in (smooth(width=48, height=64), smooth()[0], floats):
            with pytest.raises(ValueError, match="are not uint8"):
                writer.write(wrong)
        with pytest.raises(OutputError, match="there are no video frames"):
            writer.finish({})
    assert names(tmp_path) == []


def test_an_aborted_stream_leaves_every_frame_in_a_part_that_plays(tmp_path: Path) -> None:
    with writer_to(tmp_path / "a.mp4", streaming=True, comment="early") as writer:
        writer.write(smooth(20))
    part = tmp_path / "a.part.mp4"
    assert names(tmp_path) == [part.name]
    assert probe(part).frames == streamed_frames(part) == 20
    assert read_comment(part) == "early"


def test_an_aborted_stream_without_frames_leaves_nothing(tmp_path: Path) -> None:
    with writer_to(tmp_path / "a.mp4", streaming=True):
        pass
    assert names(tmp_path) == []


def test_a_stream_of_a_killed_program_plays_and_has_its_comment(tmp_path: Path) -> None:
    program = """
        import os, sys, time
        from pathlib import Path
        from tests.video.test_write import ffmpeg_of, smooth, writer_to
        path = Path(sys.argv[1])
        writer = writer_to(path, streaming=True, comment="early")
        writer.write(smooth(20))
        while path.with_name("a.part.mp4").stat().st_size < 4000:
            time.sleep(0.01)
        os.kill(ffmpeg_of(writer), 9)
        os.kill(os.getpid(), 9)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "a.mp4")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    part = tmp_path / "a.part.mp4"
    assert names(tmp_path) == [part.name]
    info = probe(part)
    assert (info.width, info.height) == (64, 48)
    assert 1 <= info.frames == len(read_frames(part)) == streamed_frames(part)
    assert read_comment(part) == "early"
