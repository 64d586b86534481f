"""A video is as it was written, to the byte, or it is reported as damaged."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from wancli.video.ffmpeg import Encoding, run_ffmpeg
from wancli.video.integrity import DAMAGED, NO_DIGEST, UNSEALED, WHOLE, Check, check_video
from wancli.video.read import packets_sha256, read_comment
from wancli.video.write import VideoWriter, WrittenVideo

# A prompt may contain what looks like the placeholder of a digest.
PROMPT = f'a "file_sha256": "{UNSEALED}" \\'


def write(path: Path, *, streaming: bool = False, digests: bool = True) -> WrittenVideo:
    frames = np.random.default_rng(7).integers(0, 256, (9, 32, 48, 3), np.uint8)
    with VideoWriter(
        path, size=(48, 32), fps=8, encoding=Encoding(preset="ultrafast"), streaming=streaming
    ) as writer:
        writer.write(frames)
        record = {"prompt": PROMPT, "output": writer.digests() if digests else {}}
        return writer.finish({"comment": json.dumps(record)})


def check(path: Path) -> Check:
    return check_video(path, json.loads(read_comment(path) or ""))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    write(path)
    return path


@pytest.mark.parametrize("streaming", [False, True])
def test_a_record_holds_the_digests_of_its_own_file(tmp_path: Path, streaming: bool):
    path = tmp_path / "a.mp4"
    written = write(path, streaming=streaming)
    record = json.loads(read_comment(path) or "")
    digests = {"packets_sha256": written.packets_sha256, "file_sha256": written.file_sha256}
    assert record == {"prompt": PROMPT, "output": digests}
    assert check_video(path, record) == Check(WHOLE)
    copied = run_ffmpeg("-i", f"file:{path}", "-c", "copy", "-f", "hash", "pipe:1").stdout.decode()
    assert copied == f"SHA256={written.packets_sha256}\n"


def test_a_flipped_bit_is_detected_anywhere(video: Path, tmp_path: Path):
    content, path = video.read_bytes(), tmp_path / "b.mp4"
    bits = np.random.default_rng(1).integers(0, 8 * len(content), 200).tolist()
    digits = content.index(b'"file_sha256": "') + 16
    for bit in (*bits, 8 * digits, 8 * content.index(b"packets_sha256"), 8 * len(content) - 1):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            result = check(path)
        except ValueError:  # the record does not even read
            continue
        assert result.status == DAMAGED, bit


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda content: content[:-1], "its packets are not those"),
        (lambda content: content[: len(content) // 2], "its packets are not those"),
        (lambda content: content + b"\0", "are intact, but not the rest"),
        (lambda content: content[:-2000] + bytes(2000), "its packets are not those"),
        (lambda content: bytes(len(content)), "it is not an MP4 file"),
        (lambda content: b"", "it is not an MP4 file"),
        (lambda content: content[:200], "it is truncated"),
    ],
)
def test_the_damage_of_a_video_is_described(
    video: Path, tmp_path: Path, damage: Callable[[bytes], bytes], why: str
):
    path = tmp_path / "b.mp4"
    path.write_bytes(damage(video.read_bytes()))
    result = check_video(path, json.loads(read_comment(video) or ""))
    assert (result.status, why in result.why) == (DAMAGED, True), result


def test_the_digest_of_packets_survives_a_stream_copy(video: Path, tmp_path: Path):
    path = tmp_path / "b.mp4"
    run_ffmpeg("-i", f"file:{video}", "-c", "copy", "-metadata", "title=x", f"file:{path}")
    assert packets_sha256(path) == packets_sha256(video)
    assert "its packets are intact" in check(path).why


def test_a_video_of_an_earlier_version_is_decoded(tmp_path: Path):
    path = tmp_path / "a.mp4"
    md5 = write(path, digests=False).framemd5
    for output, status in (
        ({}, NO_DIGEST),
        ({"framemd5": md5}, NO_DIGEST),
        ({"framemd5": "0"}, DAMAGED),
    ):
        assert check_video(path, {"output": output}).status == status
    path.write_bytes(path.read_bytes()[:-10])
    assert check_video(path, {}).status == DAMAGED
