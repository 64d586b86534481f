"""`wancli show`: a summary, the whole record, and exact numbers as JSON."""

import json
import re
from pathlib import Path

import pytest

from tests.conftest import Wancli

RECORD = {
    "schema": "wancli.run/1",
    "id": "x",
    "status": "ok",
    "command": "generate",
    "created": "2026-11-27T15:00:00+00:00",
    "request": {
        "prompt": "a red circle",
        "seed": 7,
        "model": "demo",
        "sampling": {"steps": 20, "guidance_scale": 5.0, "flow_shift": 3.0, "scheduler": "unipc"},
        "video": {"width": 96, "height": 96, "num_frames": 33, "fps": 16},
        "sources": {"sampling.steps": "flag", "model": "WANCLI_MODEL", "video.fps": "preset demo"},
    },
    "hash": "0123",
    "output": {"frames": 33, "duration_s": 2.0625, "bytes": 1234},
    "timings": {"load_s": 1.23456789, "total_s": 4.5, "steps_ms": [100.123456, 99.0]},
    "cache": {"method": "cachedit", "reused": 12, "forwards": 40},
}


@pytest.fixture
def record(tmp_path: Path) -> Path:
    path = tmp_path / "red.json"
    path.write_text(json.dumps(RECORD))
    return path


def test_a_summary_has_ten_lines_at_most(wancli: Wancli, record: Path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = wancli("show", record)
    assert result.code == 0, result.err
    lines = dict(re.split("  +", line, maxsplit=1) for line in result.out.splitlines())
    assert len(lines) <= 10
    assert lines["prompt"] == "a red circle"
    assert lines["video"] == "96x96, 33 frames at 16 fps"
    assert lines["sampling"] == "seed 7, 20 steps, unipc, guidance 5, shift 3"
    assert lines["step cache"] == "cachedit, 12 of 40 forwards reused"
    assert lines["settings from"] == "flags steps; WANCLI_MODEL; preset demo"
    assert lines["time"] == "load 1.23 s  total 4.50 s"
    assert "revision" not in result.out


def test_all_prints_every_value_and_json_the_exact_record(wancli: Wancli, record: Path):
    whole = wancli("show", record, "--all").out
    for text in ("[request.sampling]", "flow_shift", "[100.1, 99]", "0123", "bytes", "1.235"):
        assert text in whole
    assert "1.23456" not in whole
    assert json.loads(wancli("show", record, "--json").out) == RECORD


def test_each_of_several_files_is_named(wancli: Wancli, record: Path):
    result = wancli("show", record, record)
    assert result.out.count("red.json") == 2


def test_a_record_that_lacks_almost_everything_is_shown(wancli: Wancli, record: Path):
    request = {"prompt": "a", "seed": 1, "model": "demo", "sampling": None, "sources": []}
    record.write_text(json.dumps({**RECORD, "request": request, "timings": [], "output": {}}))
    result = wancli("show", record)
    assert result.code == 0, result.err
    assert [line.split()[0] for line in result.out.splitlines()] == [
        "prompt", "model", "sampling", "step", "made"
    ]  # fmt: skip


def test_a_summary_has_the_prompt_changes_of_a_rollout(wancli: Wancli, record: Path):
    rollout = json.loads(record.read_text())
    rollout["request"]["inputs"] = {"changes": [[3, "a blue circle"]]}
    record.write_text(json.dumps(rollout))
    assert "a red circle; chunk 3: a blue circle\n" in wancli("show", record).out


@pytest.mark.parametrize(
    ("sampler", "line"),
    [
        ("unipc", "seed 7, 20 steps a chunk, unipc, guidance 5, shift 3"),
        ("few-step", "seed 7, timesteps 1000,500, few-step, shift 3"),
    ],
)
def test_a_summary_of_a_rollout_has_its_steps(
    wancli: Wancli, record: Path, sampler: str, line: str
):
    rollout = json.loads(record.read_text())
    rollout["request"]["rollout"] = {"sampler": sampler, "steps_list": "1000,500"}
    record.write_text(json.dumps(rollout))
    assert f"  {line}\n" in wancli("show", record).out
