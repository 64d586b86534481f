"""Timings of chunks: all are in the file, none stay in memory."""

import json
import os
import tracemalloc
from pathlib import Path

import pytest
import torch

from wancli.catalog.geometry import Span
from wancli.errors import OutputError
from wancli.models.timer import Timer
from wancli.rollouts.sink import ChunkOutput
from wancli.rollouts.timings import ChunkTiming, TimingLog, rates, summed

CPU = torch.device("cpu")


def row(index: int, *, generated: bool = True) -> ChunkTiming:
    timer = Timer(CPU)
    for label in ("step", "step", "save", "decode", "wait", "clean"):
        timer.mark(label)
    output = ChunkOutput(frames=8, write_s=0.125, drift_s=0.25)
    return ChunkTiming(Span(index, 3 * index, 3), timer, generated, 27, [1.0, 0.5], output)


def test_every_chunk_is_written_as_soon_as_it_is_done(tmp_path: Path):
    rows = [row(0, generated=False), row(1), row(2)]
    with TimingLog(tmp_path / "times.jsonl") as times:
        for number, one in enumerate(rows, 1):
            times.add(one)
            lines = (tmp_path / "times.jsonl").read_text().splitlines()
            assert len(lines) == number
        written = [json.loads(line) for line in lines]
        assert list(times) == written == [one.as_json() for one in rows]
        spent = summed(times)
        assert (spent["drift_s"], spent["save_s"]) == (0.75, 0.375)
        assert spent["denoise_s"] == pytest.approx(sum(sum(r["steps_ms"]) for r in written) / 1000)
        assert rates(times, 4.0)["wall"] == 16 / 4  # of the two generated chunks


def test_rates_are_those_of_generated_chunks():
    times = {"steps_ms": [60.0, 40.0], "clean_ms": 100.0, "decode_ms": 50.0}
    times |= dict.fromkeys(("write_ms", "drift_ms", "wait_ms"), 900.0)
    rows = [{"made": made, "video_frames": 10, **times} for made in (False, True, True)]
    assert rates(rows, 2.0) == pytest.approx({"transformer": 50, "with_vae": 40, "wall": 10})


def test_a_record_lists_the_first_and_the_last_chunks(tmp_path: Path):
    with TimingLog(tmp_path / "times.jsonl") as times:
        assert times.ends(2) == []
        for count in range(1, 8):
            times.add(row(count - 1))
            recorded = [line["chunk"] for line in times.ends(2)]
            expected = list(range(count))
            assert recorded == (expected if count <= 4 else [*expected[:2], *expected[-2:]])


def test_another_run_replaces_the_timings(tmp_path: Path):
    path = tmp_path / "times.jsonl"
    path.write_text('{"chunk": 0, "made": true}\n{"chunk": 1, "ma')  # killed within a line
    with TimingLog(path) as times:
        times.add(row(0))
        assert [line["chunk"] for line in times] == [0]


def test_timings_do_not_accumulate_in_memory(tmp_path: Path):
    with TimingLog(tmp_path / "times.jsonl") as times:
        times.add(row(0))
        tracemalloc.start()
        try:
            for index in range(500):
                times.add(row(index))
            grown, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert grown < 20_000  # 500 rows in memory are a megabyte


def test_a_full_disk_is_reported(tmp_path: Path):
    disk = Path("/dev/full")
    if not disk.exists():
        pytest.skip("Linux has a disk that is always full")
    with TimingLog(tmp_path / "times.jsonl") as times, disk.open("r+b") as full:
        os.dup2(full.fileno(), times._file.fileno())
        with pytest.raises(OutputError, match=r"times\.jsonl: No space left") as caught:
            times.add(row(0))
    assert "`resume`" in caught.value.hint
