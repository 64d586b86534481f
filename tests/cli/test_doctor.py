"""`wancli doctor` predicts whether generate can run."""

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import Wancli
from wancli.utils.threads import thread_settings


def test_doctor_lists_its_findings_about_this_machine(wancli: Wancli, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("WANCLI_CACHE_DIR", str(tmp_path / "cache"))
    result = wancli("doctor", "--json", "-q")
    report = json.loads(result.out)
    assert result.code == 0
    assert report["ok"] is True
    findings = {(f["group"], f["name"]): f for f in report["findings"]}
    demo = next(model for model in report["models"] if model["model"] == "demo")
    assert (demo["fits"], demo["width"], demo["num_frames"]) == (True, 96, 33)
    assert findings["versions", "diffusers"]["state"] == "ok"
    assert findings["video", "ffmpeg"]["state"] == "ok"
    assert findings["attention", "native"]["state"] == "ok"
    threads = f"{torch.get_num_threads()}, {thread_settings()}"
    assert findings["memory", "CPU threads"]["value"] == threads
    assert findings["memory", "rates"]["fix"] == "wancli doctor --measure"


def test_doctor_exits_with_4_if_generate_cannot_run(
    wancli: Wancli, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nosuch/ffmpeg")
    result = wancli("doctor", "-q")
    assert result.code == 4
    assert "broken" in result.out
    assert result.out.splitlines()[1].split()[:2] == ["demo", "96x96,"]  # the verdict comes first
    error, hint = result.err.strip().splitlines()
    assert error == "error: generate cannot run on this machine: ffmpeg."
    assert "IMAGEIO_FFMPEG_EXE" in hint
