"""Existing videos: which request they belong to, and whether they are whole."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import tiny_clip
from tests.records.test_record import request
from wancli.planning.existing import check_existing
from wancli.records.record import Request, RunRecord
from wancli.video.ffmpeg import Encoding
from wancli.video.integrity import DAMAGED, NO_DIGEST, WHOLE
from wancli.video.write import VideoWriter

Damage = Callable[[bytes], bytes]
REQUEST = request()


def write_video(folder: Path, *, metadata: bool = True, digests: bool = True) -> Path:
    """A video of `request()`, and its record beside it."""
    import numpy as np

    record: dict[str, Any] = RunRecord(
        "id", "ok", "generate", "now", REQUEST.as_json(), REQUEST.hash
    ).as_json()
    path = folder / "a.mp4"
    with VideoWriter(path, size=(48, 32), fps=8, encoding=Encoding(preset="ultrafast")) as writer:
        writer.write(np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), np.uint8))
        inside = record | {"output": writer.digests() if digests else {}}
        written = writer.finish({"comment": json.dumps(inside)} if metadata else {})
    output = written.as_json()
    if not digests:
        del output["packets_sha256"], output["file_sha256"]
    path.with_suffix(".json").write_text(json.dumps(record | {"output": output}))
    return path


def status(video: Path, requested: Request = REQUEST) -> str | None:
    check = check_existing(video, requested)
    return check.status if check else None


@pytest.mark.parametrize("metadata", [True, False])
def test_a_whole_video_matches_only_its_request(tmp_path: Path, metadata: bool):
    video = write_video(tmp_path, metadata=metadata)
    assert status(video) == WHOLE
    assert status(video, request("another")) is None


def test_a_video_without_digests_is_judged_by_its_frames(tmp_path: Path):
    video = write_video(tmp_path, digests=False)
    assert status(video) == NO_DIGEST
    sidecar = video.with_suffix(".json")
    sidecar.write_text(sidecar.read_text().replace('"framemd5": "', '"framemd5": "0'))
    assert status(video) == DAMAGED


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-9],
        lambda content: content[:-50] + bytes([content[-50] ^ 1]) + content[-49:],
        lambda content: content.replace(b'"hash": "', b'"hash": "0', 1)[: len(content)],
        lambda content: content.replace(b'"schema"', b'"schemb"', 1),
        lambda content: bytes(len(content)),
        lambda content: content[:60],
        lambda content: b"",
    ],
    ids=["cut", "a bit", "the hash", "the record", "zeros", "the index", "nothing left"],
)
def test_a_damaged_video_is_recognized_by_what_is_left_of_it(tmp_path: Path, damage: Damage):
    video = write_video(tmp_path)
    content = damage(video.read_bytes())
    video.write_bytes(content)
    assert status(video) == DAMAGED


def test_a_foreign_video_beside_our_record_is_not_ours(tmp_path: Path):
    video = write_video(tmp_path)
    tiny_clip(video, 1)
    assert status(video) is None
    video.write_bytes(b"x" * 10**6)
    assert status(video) is None
