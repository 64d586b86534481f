"""A file is whole under its name, or as it was before."""

import os
import stat
from pathlib import Path

import pytest
import torch

from wancli.errors import OutputError
from wancli.files import write_whole
from wancli.pipeline.store import RolloutStore
from wancli.video.latents import save_latents


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_replaces_the_one_before_and_leaves_nothing_beside_it(tmp_path: Path):
    path = tmp_path / "deep" / "a.json"
    for content in (b"one", b"two"):
        write_whole(path, content, hint="", sync=content == b"two")
        assert path.read_bytes() == content
        assert names(path.parent) == ["a.json"]


def test_who_has_the_earlier_file_open_reads_it_to_its_end(tmp_path: Path):
    path = tmp_path / "a.json"
    write_whole(path, b"one", hint="")
    with path.open("rb") as earlier:
        write_whole(path, b"another", hint="")
        assert earlier.read() == b"one"


def test_a_name_may_be_as_long_as_the_disk_takes_it(tmp_path: Path):
    for name in ("a" * 255, "\N{SNOWMAN}" * 85):
        write_whole(tmp_path / name, b"x", hint="")
        assert (tmp_path / name).read_bytes() == b"x"
    with pytest.raises(OutputError, match="File name too long"):
        write_whole(tmp_path / ("a" * 256), b"x", hint="")
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize("place", ["file/a.json", "folder"])
def test_a_place_that_cannot_be_written_is_one_error_and_stays_as_it_was(
    place: str, tmp_path: Path
):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="cannot write") as caught:
        write_whole(tmp_path / place, b"x", hint="another place")
    assert caught.value.hint == "another place"
    assert names(tmp_path) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_write_that_fails_midway_leaves_the_file_before(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text("before")
    not_bytes: bytes = "text"  # type: ignore[assignment]
    with pytest.raises(TypeError):
        write_whole(path, not_bytes, hint="")
    assert path.read_text() == "before"
    assert names(tmp_path) == ["a.json"]


def test_latents_can_be_read_by_whom_the_umask_lets(tmp_path: Path):
    latents = torch.zeros(1, 4, 2, 3, 3)
    before = os.umask(0o022)
    try:
        save_latents(latents, tmp_path / "z.safetensors", {})
        RolloutStore(tmp_path).save("chunk-000000", latents)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("*.safetensors")}
    assert len(names(tmp_path)) == 2
    assert modes == {0o644}
