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
    timer, decode = Timer(CPU), Timer(CPU)
    for label in ("step", "step", "wait", "clean"):
        timer.mark(label)
    decode.mark("decode")
    output = ChunkOutput(frames=8, decode=decode, write_s=0.125, drift_s=0.25)
    return ChunkTiming(Span(index, 3 * index, 3), timer, timer, generated, 27, [1.0, 0.5], output)


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


def timed(at: dict[str, float], *, steps: float, clean: float, decode: float) -> dict[str, object]:
    """A row of 10 video frames, with the milliseconds of its lanes."""
    return {
        "made": True, "video_frames": 10, "steps_ms": [steps], "clean_ms": clean,
        "decode_ms": decode, "write_ms": 0.0, "drift_ms": 0.0, "wait_ms": 0.0, "at_ms": at,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("starts", "decodes", "seconds"),
    [
        ((0.0, 600.0), (300.0, 900.0), 1.2),  # in turn
        ((0.0, 300.0), (100.0, 400.0), 0.7),  # beside the clean pass and the next chunk
        ((0.0, 300.0), (100.0, 700.0), 0.9),  # nothing ran for 100 ms of these 1000
    ],
)
def test_time_in_which_both_lanes_run_counts_once(
    starts: tuple[float, ...], decodes: tuple[float, ...], seconds: float
):
    rows = [
        timed({"step": start, "clean": start + 100, "decode": decode}, steps=100, clean=200,
              decode=300)
        for start, decode in zip(starts, decodes, strict=True)
    ]  # fmt: skip
    expected = {"transformer": 20 / 0.6, "with_vae": 20 / seconds, "wall": 10.0}
    assert rates(rows, 2.0) == pytest.approx(expected)


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
