"""The benchmark of GPUs, with small sizes on a CPU."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.__main__ import CASES, main
from benchmarks.gpu.table import DOCUMENTS, ROOT, filled, read_results


def measured(folder: Path, *flags: str) -> list[dict[str, Any]]:
    out = folder / "cpu.json"
    assert main(["--small", "--out", str(out), *flags]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def check(rows: list[dict[str, Any]], cases: Collection[int]) -> None:
    assert rows[-1]["done"] is True
    assert {row["case"] for row in rows[:-1]} == set(cases)
    assert not [row for row in rows if "error" in row and not isinstance(row["error"], float)]
    for row in rows:
        assert "skipped" not in row
        if "error" in row:
            assert row["error"] < 0.01, row


def test_kernels_are_measured_with_their_errors(tmp_path: Path):
    rows = measured(tmp_path, "--cases", "0,1,2,3")
    check(rows, [0, 1, 2, 3])
    assert all(row["ms"] > 0 for row in rows if "tflops" in row)


@pytest.mark.slow
def test_every_case_is_measured(tmp_path: Path):
    cases = {case for case, _ in CASES} - {6, 8}  # compiled, and fp8
    rows = measured(tmp_path, "--cases", ",".join(map(str, cases)))
    check(rows, cases)


def test_cases_are_skipped_when_time_is_up(tmp_path: Path):
    rows = measured(tmp_path, "--cases", "0,3", "--seconds", "0")
    assert all("skipped" in row for row in rows[:-1])
    assert {row["case"] for row in rows[:-1]} == {0, 3}


CARD = [
    {
        "case": 0,
        "name": "versions",
        "card": "A GPU",
        "driver": "1.2",
        "torch": "2.11",
        "cudnn": 91900,
    },
    {"case": 6, "name": "compiled, window 9", "transformer_fps": 51.26},
    {"case": 6, "name": "compiled, error", "error": 0.0051},
    {"case": 6, "name": "compiled, window 21", "error": "OutOfMemoryError: no"},
    {"case": 9, "name": "compiled, window 9", "wall_fps": 33.33},
    {"case": 9, "name": "compiled, window 9, MP4", "wall_fps": 30.06},
    {
        "case": 7,
        "name": "fast",
        "decode_fps": 80,
        "ms_per_latent": 50,
        "error": 0.004,
        "psnr_db": 59,
    },
    {"case": 1, "name": "flash, 12 heads, 32 keys", "tflops": 400.4},
    {"case": 1, "name": "cudnn, 12 heads, 32 keys", "tflops": 600.6},
    {"done": True},
]


def test_tables_are_made_of_the_results(tmp_path: Path):
    (tmp_path / "a.json").write_text("\n".join(map(json.dumps, CARD)))
    text = "a\n<!-- gpu-{0}: begin -->\nold\n<!-- gpu-{0}: end -->\nb"
    cards = read_results(tmp_path)
    for kind, line in (
        ("rollouts", "| compiled, window 9 | 51.3 | 33.3 | 30.1 | 5.1e-03 |"),
        ("decoding", "| fast | 50.0 | 80.0 | 4.0e-03 | 59 dB |"),
        ("attention", "| 12 heads, 32 keys | 400 | 601 |"),
    ):
        lines = filled(text.format(kind), cards).splitlines()
        assert lines[3] == "A GPU (driver 1.2, torch 2.11, cuDNN 9.19):"
        assert lines[-4:] == [line, "", f"<!-- gpu-{kind}: end -->", "b"]
        empty = filled(text.format(kind), [])
        assert empty == text.format(kind).replace("old\n", "")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_tables_in_documents_are_those_of_the_results(name: str):
    text = (ROOT / name).read_text("utf-8")
    assert "<!-- gpu-rollouts: begin -->" in text
    assert filled(text, read_results()) == text, "run python -m benchmarks.gpu.table"
