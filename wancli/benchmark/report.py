"""A benchmark as an HTML page: a table, speed against quality, and the videos side by side."""

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from wancli.benchmark.cases import Arm, Bench, Run
from wancli.benchmark.plot import plot_of
from wancli.errors import missing
from wancli.records.record import ForwardStats
from wancli.utils.files import write_whole
from wancli.utils.html import templates
from wancli.video.compare import VARIANT

PAGE = "report.html"
MAX_EMBEDDED = 20 * 2**20  # bytes of videos embedded in the page
NONE = "\N{EN DASH}"


def write_report(bench: Bench, folder: Path) -> Path:
    """Write the page of the videos in `folder`, whole or not at all; returns its path.

    Small videos are embedded. Raises InputError for a missing video, OutputError if the page cannot
    be written.
    """
    page = folder / PAGE
    # A prompt from a shell may not be valid UTF-8.
    text = _render(bench, folder).encode(errors="replace")
    write_whole(page, text, hint="another `output`", overwrite=True)
    return page


def _render(bench: Bench, folder: Path) -> str:
    environment = templates(Path(__file__).parent)
    environment.filters["fixed"] = _fixed
    sources, embedded = _sources(bench.runs, folder)
    return environment.get_template("report.html.jinja").render(
        bench=bench,
        notes=list(_notes(bench)),
        plot=plot_of(bench),
        prompts=_prompts(bench.runs),
        sources=sources,
        embedded=embedded,
        strips=_strips,
        variant=VARIANT,
    )


def _fixed(value: float | None, decimals: int) -> str:
    """Format a number, or a dash for None."""
    if value is None:
        return NONE
    return f"{value:.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def _sources(runs: Sequence[Run], folder: Path) -> tuple[dict[str, str], bool]:
    """The `src` of each video by path, and whether the videos are embedded."""
    files = {run.video: folder / run.video for run in runs}
    for file in files.values():
        if not file.is_file():
            raise missing("video", file)
    embedded = sum(file.stat().st_size for file in files.values()) <= MAX_EMBEDDED
    if not embedded:
        return {name: quote(name) for name in files}, embedded
    encoded = {name: base64.b64encode(file.read_bytes()).decode() for name, file in files.items()}
    return {name: f"data:video/mp4;base64,{data}" for name, data in encoded.items()}, embedded


def _notes(bench: Bench) -> Iterator[str]:
    """The results in sentences."""
    for arm in bench.arms[1:]:
        yield from _notes_on(arm)
    if bench.identity is False:
        yield "An exact variant is not exact: its latents differ from the baseline's."
    if bench.floor:
        yield (
            f"Another seed of the baseline: SSIM {bench.floor.ssim:.3f}, "
            f"{bench.floor.ssim_worst:.3f} in the worst video frame."
        )
    if len({run.case for run in bench.runs}) == 1:
        yield "One prompt and one seed: all times are from a single run."
    if bench.chosen:
        yield f"Chosen: {bench.chosen}."


def _notes_on(arm: Arm) -> Iterator[str]:
    summary = arm.summary
    speed = (
        f"{arm.name}: denoising {summary.denoise_speed_up.median:.2f}\N{MULTIPLICATION SIGN} "
        f"as fast, {summary.total_speed_up.median:.2f}\N{MULTIPLICATION SIGN} end to end"
    )
    if arm.does_the_same:
        yield f"{arm.name}: nothing was reused; its times differ from the baseline's by chance."
        return
    if summary.equal_latents:
        yield f"{speed}; the latents are equal, bit for bit."
    elif summary.ssim is not None:
        yield (
            f"{speed}; a different sample, with SSIM {summary.ssim:.3f} and "
            f"{_fixed(summary.ssim_worst, 3)} in its worst video frame."
        )
    if arm.reused_nothing:
        yield f"{arm.name}: nothing was reused."


def _prompts(runs: Sequence[Run]) -> dict[str, dict[int, list[Run]]]:
    """Runs by prompt and seed, in order."""
    out: dict[str, dict[int, list[Run]]] = {}
    for run in runs:
        out.setdefault(run.prompt, {}).setdefault(run.seed, []).append(run)
    return out


def _strips(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Cells by branch, one per forward: its step, the share of blocks computed, a tooltip."""
    out: dict[str, list[dict[str, Any]]] = {}
    for use in run.uses:
        share = use.blocks / (use.blocks_all or 1)
        cell = {
            "step": use.step,
            "share": round(share, 3),
            "reused": use.reused,
            "tooltip": _tooltip(use),
        }
        out.setdefault(use.branch, []).append(cell)
    return out


def _tooltip(use: ForwardStats) -> str:
    residual = "" if use.residual is None else f"\nresidual {use.residual:.4g}"
    word = "reused" if use.reused else "computed"
    blocks = f"{use.blocks} of {use.blocks_all} blocks"
    return f"step {use.step + 1}, {use.branch}: {word}, {blocks}{residual}"
