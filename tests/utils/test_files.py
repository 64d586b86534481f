"""A file is written whole, or stays as it was."""

import errno
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.records.test_record import request
from wancli.errors import OutputError
from wancli.records.record import RunRecord
from wancli.rollouts.store import RolloutStore
from wancli.utils.files import is_part, part_name, remove_parts, write_beside, write_whole
from wancli.video.latents import drop_kept_latents, keep_latents, save_latents


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_replaces_the_earlier_one_and_leaves_no_others(tmp_path: Path):
    path = tmp_path / "deep" / "a.json"
    for content in (b"one", b"two"):
        write_whole(path, content, hint="", overwrite=True, sync=content == b"two")
        assert path.read_bytes() == content
        assert names(path.parent) == ["a.json"]


def test_an_open_reader_still_sees_the_earlier_file(tmp_path: Path):
    path = tmp_path / "a.json"
    write_whole(path, b"one", hint="")
    with path.open("rb") as earlier:
        write_whole(path, b"another", hint="", overwrite=True)
        assert earlier.read() == b"one"


def test_a_name_may_be_as_long_as_the_disk_allows(tmp_path: Path):
    for name in ("a" * 255, "\N{SNOWMAN}" * 85):
        write_whole(tmp_path / name, b"x", hint="")
        assert (tmp_path / name).read_bytes() == b"x"
    with pytest.raises(OutputError, match="File name too long"):
        write_whole(tmp_path / ("a" * 256), b"x", hint="")
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize("place", ["file/a.json", "folder"])
def test_an_unwritable_path_is_one_error_and_changes_nothing(place: str, tmp_path: Path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="cannot write") as caught:
        write_whole(tmp_path / place, b"x", hint="another place")
    assert caught.value.hint == "another place"
    assert names(tmp_path) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_failed_write_leaves_the_earlier_file(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text("before")
    not_bytes: bytes = "text"  # type: ignore[assignment]
    with pytest.raises(TypeError):
        write_whole(path, not_bytes, hint="")
    assert path.read_text() == "before"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_an_existing_file_stays_without_overwrite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
):
    def unsupported(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "a disk without hard links")

    if not links:
        monkeypatch.setattr("os.link", unsupported)
    path = tmp_path / "a.json"
    write_whole(path, b"first", hint="")
    with pytest.raises(OutputError, match="File exists"):
        write_whole(path, b"second", hint="")
    assert path.read_bytes() == b"first"
    write_whole(path, b"third", hint="", overwrite=True)
    assert path.read_bytes() == b"third"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("link", "it is a symbolic link"), ("fifo", "it is a FIFO"), ("folder", "it is a folder")],
)
def test_links_fifos_and_folders_are_never_replaced(tmp_path: Path, kind: str, reason: str):
    path, other = tmp_path / "a.json", tmp_path / "other"
    other.write_text("mine")
    makers = {"link": lambda: path.symlink_to(other), "fifo": lambda: os.mkfifo(path)}
    makers.get(kind, path.mkdir)()
    before = path.lstat()
    with pytest.raises(OutputError, match=reason):
        write_whole(path, b"x", hint="", overwrite=True)
    assert os.path.samestat(path.lstat(), before)
    assert other.read_text() == "mine"


def test_rescued_files_get_a_free_name(tmp_path: Path):
    path = tmp_path / "a.latents.safetensors"
    path.write_text("mine")
    saved = [write_beside(path, text, hint="") for text in (b"one", b"two")]
    assert [file.name for file in saved] == [
        "a.latents-1.safetensors", "a.latents-2.safetensors",
    ]  # fmt: skip
    assert [file.read_bytes() for file in (path, *saved)] == [b"mine", b"one", b"two"]


def test_rescued_latents_of_two_runs_are_both_kept_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for number in range(2):
        saved = keep_latents(torch.full((1, 4, 2, 3, 3), number), Path("/proc/none/a.mp4"), {})
        assert saved
        assert load_file(saved)["latents"].eq(number).all()
    assert names(tmp_path) == ["a.latents-1.safetensors", "a.latents.safetensors"]


def test_kept_latents_go_when_their_video_is_there_and_no_others_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    latents, video = torch.zeros(1, 4, 2, 3, 3), tmp_path / "a.mp4"
    ours, other = (
        RunRecord("id", "failed", "generate", "now", one.as_json(), one.hash).as_json()
        for one in (request(), request(seed=2))
    )
    for path, record in ((video, ours), (video, other), (tmp_path / "b" / "a.mp4", ours)):
        assert keep_latents(latents, path, record)
    (tmp_path / "a.latents-2.safetensors").write_text("mine")
    save_latents(latents, tmp_path / "a.latents-3.safetensors", ours)
    kept = keep_latents(latents, video, ours)
    monkeypatch.setattr("wancli.errors.closest", None)  # no names are looked for in the folder
    drop_kept_latents(video, request(machine={"quantize": "int8"}).as_json())
    assert kept == tmp_path / "a.latents-4.safetensors"
    assert names(tmp_path) == [
        *(f"a.latents-{number}.safetensors" for number in (1, 2, 3)), "b",
    ]  # fmt: skip
    assert names(tmp_path / "b") == ["a.latents.safetensors"]


def test_only_our_parts_are_removed_and_an_older_folder_is_restored(tmp_path: Path):
    others = [".a.mp4.part", ".a.mp4.123.part", ".a.mp4.0123456789abcdeg.part", "a.mp4.part"]
    for name in others:
        (tmp_path / name).write_text("mine")
    for final in ("a.mp4", "b.mp4", "a" * 255):
        part_name(tmp_path / final).write_text("half")
    part_name(tmp_path / "bench").mkdir()
    (old := part_name(tmp_path / "bench", "old")).mkdir()
    (old / "report.html").write_text("whole")
    remove_parts(tmp_path, ["a.mp4", "a" * 255, "bench"])
    left = names(tmp_path)
    assert [name for name in left if is_part(name)] == [n for n in left if n.startswith(".b.mp4.")]
    assert set(others) < set(left)
    assert (tmp_path / "bench" / "report.html").read_text() == "whole"
    remove_parts(tmp_path)
    assert names(tmp_path) == sorted([*others, "bench"])


def test_latents_have_the_permissions_of_the_umask(tmp_path: Path):
    latents = torch.zeros(1, 4, 2, 3, 3)
    before = os.umask(0o022)
    try:
        save_latents(latents, tmp_path / "z.safetensors", {})
        RolloutStore(tmp_path).save("chunk-000000", latents)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert names(tmp_path) == ["chunk-000000.safetensors", "chunks.jsonl", "z.safetensors"]
    assert modes == {0o644}
