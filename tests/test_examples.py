"""The examples run as they are."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_first_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "first_steps.py"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "(9, 48, 48, 3) uint8 seed 1"
    assert lines[2].startswith('wan2.1-t2v-14b: fits with `offload="group"`: needs 9.4 GiB of 24.0')
    assert lines[3] == "(9, 96, 96, 3)"
    assert lines[4] == "step 1 of 2, sigma 1.000"
    assert [line.split(",")[0] for line in lines[6:9]] == [
        "chunk 0: 9 frames", "chunk 1: 12 frames", "chunk 2: 12 frames"
    ]  # fmt: skip
    assert lines[9] == "first.mp4"
    assert "multiple of" in lines[10]
    assert "Hint: " in lines[10]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.json", "first.mp4"]
