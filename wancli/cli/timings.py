"""Timings of a finished video, as tables and lines."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

Row = tuple[str, ...]
Table = tuple[Row, list[Row]]  # the columns, all of numbers, and the rows
SHOWN = 10  # rows at either end of a long table of chunks
_ROWS = 18  # lines of a short table of steps, without its header
_FEW = 8  # steps that need only one column
_GAP = 2  # columns of the terminal
_imported = time.monotonic()
_CHUNKS = (
    "chunk", "steps", "ms: step", "clean", "decode", "write", "drift", "wait", "K/V tokens",
    "frames",
)  # fmt: skip
_LANES = ("clean_ms", "decode_ms", "write_ms", "drift_ms", "wait_ms")


def process_start() -> float:
    """When this process started, by `time.monotonic`; where that is unknown, this module."""
    with suppress(OSError, AttributeError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot
        return time.monotonic() - age
    return _imported


def phases(timings: Mapping[str, Any], *, start_s: float) -> list[str]:
    """Seconds of each phase; `start_s` passed before the first, and count in the total."""
    spent = {"start": start_s} if start_s >= 0.005 else {}
    spent |= {name.removesuffix("_s"): s for name, s in timings.items() if name.endswith("_s")}
    if "total" in spent:
        spent["total"] = spent.pop("total") + start_s
    return [f"{name.replace('_', ' ')} {seconds:.2f} s" for name, seconds in spent.items()]


def rates(timings: Mapping[str, Any]) -> list[str]:
    """Video frames per second of a rollout and the size of its cache; nothing of a clip."""
    if not (fps := timings.get("fps")):
        return []
    first, *rest = [f"{name.replace('_', ' ')} {rate:.1f}" for name, rate in fps.items()]
    kv = f"rolling K/V {timings['kv_bytes'] / 2**20:.1f} MiB"
    return [f"video frames per second: {first}", *rest, kv]


def in_lines(items: Sequence[str], width: int) -> Iterator[str]:
    """Items side by side on lines of at most `width` columns."""
    line = ""
    for item in items:
        if line and len(line) + _GAP + len(item) > width:
            yield line
            line = item
        else:
            line = f"{line}{' ' * _GAP}{item}" if line else item
    if line:
        yield line


def steps_table(timings: Mapping[str, Any], *, width: int) -> Table:
    """The steps side by side, in columns of at most `_ROWS`: sigma, time, and the work done."""
    steps: Sequence[float] = timings["steps_ms"]
    uses: Sequence[Mapping[str, Any]] = timings.get("uses", ())
    unit, scale = ("s", 1e-3) if max(steps) >= 10_000 else ("ms", 1.0)
    digits = 1 if unit == "s" and max(steps) < 100_000 else 0
    run = _share_run(uses)
    header = ("step", "sigma", *(["run"] if uses else []), unit)
    cells = [
        (
            str(index + 1),
            f"{sigma:.4f}",
            *([f"{run[index]:.0%}"] if uses else []),
            f"{ms * scale:.{digits}f}",
        )
        for index, (sigma, ms) in enumerate(zip(timings["sigmas"], steps, strict=True))
    ]
    each = sum(max(map(len, column)) + _GAP for column in zip(header, *cells, strict=True)) + _GAP
    groups = max(1, min((width + 2 * _GAP) // each, -(-len(cells) // _FEW)))
    cells = _ends(cells, _ROWS * groups // 2, tuple("…" for _ in header))
    rows = -(-len(cells) // groups)
    cells += [("",) * len(header)] * (rows * groups - len(cells))
    return _side_by_side([header] * groups), [_side_by_side(cells[n::rows]) for n in range(rows)]


def whole_steps_table(timings: Mapping[str, Any]) -> Table:
    """A row per step: its share of the time, and what each branch of a step cache computed."""
    steps: Sequence[float] = timings["steps_ms"]
    uses: Sequence[Mapping[str, Any]] = timings.get("uses", ())
    branches = list(dict.fromkeys(use["branch"] for use in uses))
    cells_of = {(use["step"], use["branch"]): _use(use) for use in uses}
    rows = []
    each = zip(timings["sigmas"], timings["forwards"], steps, strict=True)
    for index, (sigma, forwards, ms) in enumerate(each):
        cells = [cells_of.get((index, branch), "") for branch in branches] or [str(forwards)]
        share = f"{ms / (sum(steps) or 1):.1%}"
        rows.append((str(index + 1), f"{sigma:.4f}", *cells, f"{ms:.0f}", share))
    return ("step", "sigma", *(branches or ["forwards"]), "ms", "share"), rows


def chunks_table(chunks: Sequence[Mapping[str, Any]], *, whole: bool) -> Table:
    """A row per chunk; unless `whole`, of many chunks the first and last.

    `wait` is how long denoising stood still for decoding, writing and drift beside it.
    """
    rows = [_chunk_cells(chunk) for chunk in chunks]
    return _CHUNKS, rows if whole else _ends(rows, SHOWN, tuple("…" for _ in _CHUNKS))


def _chunk_cells(chunk: Mapping[str, Any]) -> Row:
    steps, name = chunk["steps_ms"], chunk["chunk"]
    mean = f"{sum(steps) / len(steps):.0f}" if steps else "kept" if name >= 0 else "given"
    rest = (f"{chunk[key]:.0f}" for key in _LANES)
    return (
        str(name),
        str(len(steps)),
        mean,
        *rest,
        str(chunk["kv_tokens"]),
        str(chunk["video_frames"]),
    )


def _ends(rows: list[Row], count: int, between: Row) -> list[Row]:
    """All rows, or of many the first and last `count` with `between` between them."""
    return rows if len(rows) <= 2 * count + 1 else [*rows[:count], between, *rows[-count:]]


def _side_by_side(groups: Sequence[Row]) -> Row:
    """Cells of the groups, with an empty one between groups."""
    return tuple(cell for group in groups for cell in ("", *group))[1:]


def _share_run(uses: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """The share of its blocks that each step ran, in all branches."""
    ran: dict[int, list[int]] = {}
    for use in uses:
        of_step = ran.setdefault(use["step"], [0, 0])
        of_step[0] += use["blocks"]
        of_step[1] += use["blocks_all"]
    return {step: blocks / (blocks_all or 1) for step, (blocks, blocks_all) in ran.items()}


def _use(use: Mapping[str, Any]) -> str:
    """`reused 1/30 0.043`: blocks that ran, of all, and the residual that decided."""
    word = "computed" if not use["reused"] else "reused" if use["blocks"] else "skipped"
    residual = "" if use["residual"] is None else f" {use['residual']:.3f}"
    return f"{word} {use['blocks']}/{use['blocks_all']}{residual}"
