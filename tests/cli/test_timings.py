"""Tables of timings at 80 columns."""

import time
from typing import Any

import pytest

from wancli.cli.table import table_lines
from wancli.cli.timings import (
    Table,
    chunks_table,
    in_lines,
    phases,
    process_start,
    steps_table,
    whole_steps_table,
)  # fmt: skip


def lines(table: Table, width: int = 80) -> list[str]:
    columns, rows = table
    return list(table_lines(columns, rows, right=columns, width=width))


def timings(count: int, *, ms: float = 1234.5, cached: bool = False) -> dict[str, Any]:
    use = {"blocks_all": 30, "residual": 0.043}
    uses = [
        {
            "step": step,
            "branch": branch,
            "blocks": 30 if step < 8 else 3,
            "reused": step >= 8,
            **use,
        }
        for step in range(count)
        for branch in ("cond", "uncond")
    ]
    return {
        "steps_ms": [ms] * count,
        "sigmas": [1 - step / count for step in range(count)],
        "forwards": [2] * count,
        **({"uses": uses} if cached else {}),
    }


@pytest.mark.parametrize(
    ("ms", "cached"), [(7.0, False), (9999.0, True), (12_345.0, False), (9_876_543.0, True)]
)
def test_fifty_steps_take_at_most_20_lines_of_80_columns(ms: float, cached: bool):
    shown = lines(steps_table(timings(50, ms=ms, cached=cached), width=80))
    assert len(shown) <= 20
    assert max(map(len, shown)) <= 80
    steps = {cell for line in shown[1:] for cell in line.split() if cell.isdigit()}
    assert {str(number) for number in range(1, 51)} <= steps
    assert "…" not in "".join(shown)


def test_steps_stand_side_by_side_and_are_read_downwards():
    shown = lines(steps_table(timings(20), width=80))
    assert shown[0].split() == ["step", "sigma", "ms"] * 3
    assert [line.split()[::3] for line in shown[1:3]] == [["1", "8", "15"], ["2", "9", "16"]]
    assert len(shown) == 8


def test_few_steps_stand_below_each_other():
    shown = lines(steps_table(timings(4, ms=12_345), width=80))
    assert shown[0].split() == ["step", "sigma", "s"]
    assert shown[4].split() == ["4", "0.2500", "12.3"]


def test_a_step_cache_shows_the_share_of_the_blocks_that_ran():
    shown = lines(steps_table(timings(12, cached=True), width=80))
    assert shown[0].split() == ["step", "sigma", "run", "ms"] * 2
    assert [line.split()[6] for line in shown[1:]] == ["100%", "100%", *["10%"] * 4]


def test_of_very_many_steps_the_first_and_last_are_shown():
    shown = lines(steps_table(timings(1000), width=80))
    assert len(shown) <= 20
    assert shown[1].split()[0] == "1"
    assert {"27", "…", "974", "1000"} <= set(" ".join(shown).split())


def test_the_whole_table_has_a_row_per_step():
    shown = lines(whole_steps_table(timings(1000, cached=True)))
    assert len(shown) == 1001
    assert shown[-1].split() == [
        "1000", "0.0010", *["reused", "3/30", "0.043"] * 2, "1234", "0.1%"
    ]  # fmt: skip


@pytest.mark.parametrize(("whole", "rows"), [(False, 21), (True, 100)])
def test_a_long_rollout_shows_its_first_and_last_chunks(rows: int, whole: bool):
    chunk = {
        "steps_ms": [100.0], "clean_ms": 1, "decode_ms": 2, "write_ms": 3, "drift_ms": 4,
        "wait_ms": 5, "kv_tokens": 32760, "video_frames": 12,
    }  # fmt: skip
    shown = lines(chunks_table([{"chunk": i, **chunk} for i in range(100)], whole=whole))
    assert len(shown) == 1 + rows
    assert shown[1].split() == ["0", "1", "100", "1", "2", "3", "4", "5", "32760", "12"]
    assert max(map(len, shown)) <= 80


def test_the_total_includes_the_start_and_no_line_splits_a_number():
    items = phases({"load_s": 1.5, "encode_prompt_s": 0.25, "total_s": 9.0}, start_s=0.5)
    assert items == ["start 0.50 s", "load 1.50 s", "encode prompt 0.25 s", "total 9.50 s"]
    assert list(in_lines(items, 30)) == [
        "start 0.50 s  load 1.50 s", "encode prompt 0.25 s", "total 9.50 s"
    ]  # fmt: skip


def test_a_process_starts_before_it_asks_when():
    assert 0 < time.monotonic() - process_start() < time.clock_gettime(time.CLOCK_BOOTTIME)
