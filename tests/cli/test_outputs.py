"""No command replaces foreign files, or writes a file that another process is writing."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.cli.test_bad_input import complaint
from tests.conftest import Wancli
from tests.fakes import tiny_clip
from tests.utils.test_outputs import other_process
from wancli.catalog.specs import SPECS
from wancli.config.settings import RolloutSettings, Settings
from wancli.planning.lora import merged_revision
from wancli.records.record import ROLLOUT_SCHEMA, SCHEMA, Request
from wancli.utils.locks import FolderLock

CHECKPOINT = Path(__file__).parents[1] / "parity" / "weights_original_names.safetensors"
GENERATE = ("generate", "a red circle", "-o", "a.mp4")
ROLLOUT = ("rollout", "a red circle", "-o", "a.mp4")
BENCH = ("bench", "a red circle", "--variant", "f: --cfg-gate 3", "-o", "a")
STARTED = ("rollout", "x", "-o", "b.mp4", "--size", "32x32", "--initial-latents", "l.st")
MINE = b"mine"


def files() -> dict[str, bytes]:
    """Content of all files here, by name."""
    paths = (path for path in Path().rglob("*") if path.is_file() and not path.is_symlink())
    return {str(path): path.read_bytes() for path in paths}


@pytest.mark.parametrize(
    ("command", "name", "error"),
    [
        (GENERATE, "a.mp4", "a.mp4 exists."),
        ((*GENERATE, "--perf-json", "p.json"), "p.json", "p.json exists."),
        ((*GENERATE, "--save-latents", "z.st"), "z.st", "z.st exists."),
        (ROLLOUT, "a.mp4", "a.mp4 exists."),
        ((*ROLLOUT, "--save-latents", "z.st"), "z.st", "z.st exists."),
        ((*ROLLOUT, "--report", "d.html"), "d.html", "d.html exists."),
        (BENCH, "a/mine.txt", "a exists."),
        (("decode", "l.st", "-o", "a.mp4"), "a.mp4", "a.mp4 exists."),
        (("repro", "v.json", "-o", "a.mp4"), "a.mp4", "a.mp4 exists."),
        (("preview", "v.mp4"), "v.png", "v.png exists."),
        (("preview", "v.mp4", "--gif", "v.gif"), "v.gif", "v.gif exists."),
        (("preview", "v.mp4", "--gif", "g.gif", "--webp", "v.webp"), "v.webp", "v.webp exists."),
        (("preset", "save", "x", "--steps", 3), "config/wancli/presets/x.toml", "exists at"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_existing_files_stay_without_overwrite(
    wancli: Wancli, workspace: None, command: tuple[object, ...], name: str, error: str
):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(MINE)
    before = files()
    result = wancli(*command)
    assert (result.code, error in complaint(result)[0]) == (2, True), result.err
    assert "--overwrite" in complaint(result)[1]
    assert files() == before


@pytest.mark.parametrize(
    ("command", "name", "error"),
    [
        (GENERATE, "a.json", "is not the record of a.mp4"),
        ((*GENERATE, "--preview-every", 1), "a.preview.png", "is not the preview of a.mp4"),
        (ROLLOUT, "a.json", "is not the record of a.mp4"),
        (ROLLOUT, "a.part.mp4", "is not the part of a.mp4"),
        (ROLLOUT, "a.rollout", "a.rollout is a file and is not replaced"),
        (ROLLOUT, "a.rollout/x.safetensors", "is not the folder of that rollout"),
        (
            BENCH,
            "a/videos/mine.mp4",
            "is not a bench report and is not replaced: it holds videos/mine.mp4",
        ),
        (("decode", "l.st", "-o", "a.mp4"), "a.json", "is not the record of a.mp4"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_side_outputs_never_replace_foreign_files(
    wancli: Wancli, workspace: None, command: tuple[object, ...], name: str, error: str
):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(MINE)
    before = files()
    result = wancli(*command, "--overwrite")
    assert (result.code, error in complaint(result)[0]) == (2, True), result.err
    assert files() == before


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (("generate", "x", "-o", "b.mp4", "--perf-json", "b.mp4"), "--output and --perf-json"),
        (("generate", "x", "-o", "b.mp4", "--perf-json", "b.json"), "the record of b.mp4 and"),
        (("generate", "x", "-o", "b.mp4", "--save-latents", "B.MP4"), "--output and --save"),
        (("generate", "x", "-o", "b.mp4", "--save-latents", "b.json"), "the record of b.mp4 and"),
        (("rollout", "x", "-o", "b.mp4", "--save-latents", "b.mp4"), "--output and --save-latents"),
        (("rollout", "x", "-o", "b.mp4", "--save-latents", "b.rollout/x"), "at once"),
        (("preview", "v.mp4", "--sheet", "b.png", "--gif", "B.gif", "--webp", "b.webp"), None),
        (("preview", "pic.png"), "pic.png is an input, and cannot be --sheet too"),
        (("preview", "x.gif", "--gif", "x.gif"), "x.gif is an input, and cannot be --gif too"),
        (("decode", "l.mp4", "-o", "l.mp4"), "l.mp4 is an input"),
        ((*STARTED, "--save-latents", "l.st"), "l.st is an input, and cannot be --save-latents"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_an_output_collides_with_no_other_and_with_no_input(
    wancli: Wancli, workspace: None, command: tuple[object, ...], error: str | None
):
    for name, like in (("pic.png", "v.mp4"), ("x.gif", "v.mp4"), ("l.mp4", "l.st")):
        Path(name).write_bytes(Path(like).read_bytes())
    before = files()
    result = wancli(*command, "--overwrite")
    if error is None:
        assert result.code == 0, result.err
        return
    assert (result.code, error in complaint(result)[0]) == (2, True), result.err
    assert files() == before


def link(path: Path) -> None:
    path.symlink_to("target")


@pytest.mark.parametrize(
    ("command", "name", "make"),
    [
        (GENERATE, "a.mp4", link),
        ((*GENERATE, "--perf-json", "p"), "p", os.mkfifo),
        ((*GENERATE, "--save-latents", "z"), "z", link),
        (ROLLOUT, "a.rollout", os.mkfifo),
        (ROLLOUT, "a.rollout", link),
        ((*ROLLOUT, "--report", "d.html"), "d.html", os.mkfifo),
        (BENCH, "a", os.mkfifo),
        (BENCH, "a", link),
        (("preview", "v.mp4", "--webp", "v.webp"), "v.webp", os.mkfifo),
        (("preset", "save", "x", "--steps", 3), "config/wancli/presets/x.toml", link),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_overwrite_never_replaces_fifos_or_links(
    wancli: Wancli,
    workspace: None,
    command: tuple[object, ...],
    name: str,
    make: Callable[[Path], object],
):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    make(path)
    Path("target").write_bytes(MINE)
    before = path.lstat(), files()
    result = wancli(*command, "--overwrite")
    assert result.code in (2, 6), result.err
    assert "a FIFO" in result.err or "a symbolic link" in result.err or "is a file" in result.err
    assert (path.lstat(), files()) == before


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ((*GENERATE, "--overwrite"), "a.mp4"),
        (("generate", "x", "-o", "x.mp4", "--perf-json", "a.mp4"), "a.mp4"),
        (ROLLOUT, "a.mp4"),
        ((*ROLLOUT, "--no-video", "--save-latents", "a.st"), "a.rollout"),
        (("rollout", "--resume", "-o", "w.mp4"), "w.rollout"),
        (BENCH, "a"),
        (("repro", "v.json", "-o", "a.mp4"), "a.mp4"),
        (("decode", "l.st", "-o", "a.mp4"), "a.json"),
        (("preview", "v.mp4"), "v.png"),
        (("model", "convert", CHECKPOINT, "a"), "a"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_name_that_another_process_writes_is_rejected_at_once(
    wancli: Wancli, workspace: None, command: tuple[object, ...], name: str
):
    locks = []

    def keep() -> None:
        locks.append(FolderLock(Path()))
        locks[0].acquire(name)

    with other_process(keep) as number:
        before = files()
        result = wancli(*command)
        assert result.code == 2, result.err
        assert f"{name} is being written by process {number} (" in complaint(result)[0]
        assert files() == before


def test_the_record_of_a_video_that_differs_in_case_stays(wancli: Wancli, workspace: None):
    before = files()
    result = wancli("generate", "a red circle", "-o", "v.MP4")
    assert (result.code, "v.json exists and is not the record of v.MP4" in result.err) == (
        2,
        True,
    )
    assert files() == before


@pytest.fixture(scope="module")
def sample_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video v.mp4 with its record, latents l.st, an unfinished rollout."""
    folder = tmp_path_factory.mktemp("samples")
    tiny_clip(folder / "v.mp4", 1)
    request = Request("a red circle", 1, Settings(), {}).as_json()
    record = {"schema": SCHEMA, "command": "generate", "request": request, "hash": "x"}
    record |= {"id": "x", "status": "ok", "created": "2026-01-01T00:00:00+00:00"}
    (folder / "v.json").write_text(json.dumps(record | {"output": {"path": "v.mp4"}}))
    latents = {"latents": np.zeros((3, 8, 4, 4), np.float32)}
    save_file(latents, folder / "l.st", metadata={"wancli": json.dumps(record)})
    revision, inputs = merged_revision(SPECS["demo"], ()), {"changes": [], "seeds": [[0, 1]]}
    rolled = Request("a red circle", 1, RolloutSettings(), {}, revision, inputs)
    (folder / "w.rollout").mkdir()
    fields = {"schema": ROLLOUT_SCHEMA, **rolled.as_json()}
    (folder / "w.rollout/rollout.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture
def workspace(sample_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of the sample files in the current folder, and a home in ./config."""
    shutil.copytree(sample_files, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def test_a_tilde_that_the_shell_leaves_is_the_home_directory(
    wancli: Wancli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    run = ("generate", "a red circle", "--seed", 1, "--dry-run")
    assert f"{tmp_path}/v/a-red-circle-1.mp4" in wancli(*run, "--output-dir=~/v").out
    monkeypatch.setenv("WANCLI_OUTPUT_DIR", "~/w")
    assert f"{tmp_path}/w/a-red-circle-1.mp4" in wancli(*run).out
    assert f"'{tmp_path}/x.png'" in wancli("preview", "~/x.png").err
