"""The benchmark of GPUs, with small sizes on a CPU."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.__main__ import CASES, main


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
