"""`wancli doctor` says what generate would meet."""

import json
from pathlib import Path

import pytest

from tests.conftest import Wancli
from wancli.utils.threads import thread_settings


def test_the_doctor_lists_what_this_machine_has(wancli: Wancli, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("WANCLI_CACHE_DIR", str(tmp_path / "cache"))
    said = wancli("doctor", "--json", "-q")
    told = json.loads(said.out)
    assert said.code == 0
    assert told["ok"] is True
    found = {(f["group"], f["name"]): f for f in told["findings"]}
    demo = next(model for model in told["models"] if model["model"] == "demo")
    assert (demo["fits"], demo["width"], demo["num_frames"]) == (True, 96, 33)
    assert found["versions", "diffusers"]["state"] == "ok"
    assert found["video", "ffmpeg"]["state"] == "ok"
    assert found["attention", "native"]["state"] == "ok"
    assert found["memory", "CPU threads"]["value"] == thread_settings()
    assert found["memory", "rates"]["fix"] == "wancli doctor --measure"


def test_where_generate_cannot_run_the_doctor_exits_with_4(
    wancli: Wancli, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nosuch/ffmpeg")
    said = wancli("doctor", "-q")
    assert said.code == 4
    assert "broken" in said.out
    assert said.out.splitlines()[1].split()[:2] == ["demo", "96x96,"]  # the verdict comes first
    error, hint = said.err.strip().splitlines()
    assert error == "error: generate cannot run on this machine: ffmpeg."
    assert "IMAGEIO_FFMPEG_EXE" in hint
