"""A bench as one HTML page: a table, speed against quality, and the videos beside each other."""

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
MOST_EMBEDDED = 20 * 2**20  # bytes of videos that are put inside the page
NONE = "\N{EN DASH}"


def write_report(bench: Bench, folder: Path) -> Path:
    """Write the page beside the videos of `folder`, whole or not at all; its path.

    Small videos are put inside it. Raises InputError for a video that is not there, OutputError for
    a place that cannot be written.
    """
    page = folder / PAGE
    # A prompt from a shell can hold what is not UTF-8.
    text = _render(bench, folder).encode(errors="replace")
    write_whole(page, text, hint="choose another folder: --output DIR", overwrite=True)
    return page


def _render(bench: Bench, folder: Path) -> str:
    environment = templates(Path(__file__).parent)
    environment.filters["fixed"] = _fixed
    sources, inside = _sources(bench.runs, folder)
    return environment.get_template("report.html.jinja").render(
        bench=bench,
        notes=list(_notes(bench)),
        plot=plot_of(bench),
        prompts=_prompts(bench.runs),
        sources=sources,
        inside=inside,
        strips=_strips,
        variant=VARIANT,
    )


def _fixed(value: float | None, decimals: int) -> str:
    """A number with so many decimals, or a dash."""
    if value is None:
        return NONE
    return f"{value:.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def _sources(runs: Sequence[Run], folder: Path) -> tuple[dict[str, str], bool]:
    """The source of each video in the page, by path; whether they are embedded."""
    files = {run.video: folder / run.video for run in runs}
    for file in files.values():
        if not file.is_file():
            raise missing("video", file)
    inside = sum(file.stat().st_size for file in files.values()) <= MOST_EMBEDDED
    if not inside:
        return {name: quote(name) for name in files}, inside
    encoded = {name: base64.b64encode(file.read_bytes()).decode() for name, file in files.items()}
    return {name: f"data:video/mp4;base64,{data}" for name, data in encoded.items()}, inside


def _notes(bench: Bench) -> Iterator[str]:
    """The results in sentences."""
    for arm in bench.arms[1:]:
        yield from _notes_on(arm)
    if bench.identity is False:
        yield "What should be exact is not: its latents differ from the baseline's."
    if bench.floor:
        yield (
            f"Another seed of the baseline: SSIM {bench.floor.ssim:.3f}, "
            f"{bench.floor.ssim_worst:.3f} in the worst video frame."
        )
    if len({run.case for run in bench.runs}) == 1:
        yield "One prompt and one seed: every time is that of a single run."
    if bench.chosen:
        yield f"Chosen: {bench.chosen}."


def _notes_on(arm: Arm) -> Iterator[str]:
    told = arm.summary
    speed = (
        f"{arm.name}: denoising {told.denoise_speed_up.median:.2f}\N{MULTIPLICATION SIGN} as fast, "
        f"{told.total_speed_up.median:.2f}\N{MULTIPLICATION SIGN} end to end"
    )
    if told.equal_latents:
        yield f"{speed}; the latents are equal, bit for bit."
    elif told.ssim is not None:
        yield (
            f"{speed}; a different sample, with SSIM {told.ssim:.3f} and "
            f"{_fixed(told.ssim_worst, 3)} in its worst video frame."
        )
    if arm.lossy and told.forwards and not told.forwards_reused:
        yield f"{arm.name}: nothing was reused."


def _prompts(runs: Sequence[Run]) -> dict[str, dict[int, list[Run]]]:
    """Runs by prompt and seed, in the order they were made."""
    out: dict[str, dict[int, list[Run]]] = {}
    for run in runs:
        out.setdefault(run.prompt, {}).setdefault(run.seed, []).append(run)
    return out


def _strips(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Every forward by branch: its step, the share of the blocks that was computed, its words."""
    out: dict[str, list[dict[str, Any]]] = {}
    for use in run.uses:
        share = use.blocks / (use.blocks_all or 1)
        cell = {"step": use.step, "share": round(share, 3), "reused": use.reused, "tip": _tip(use)}
        out.setdefault(use.branch, []).append(cell)
    return out


def _tip(use: ForwardStats) -> str:
    residual = "" if use.residual is None else f"\nresidual {use.residual:.4g}"
    word = "reused" if use.reused else "computed"
    blocks = f"{use.blocks} of {use.blocks_all} blocks"
    return f"step {use.step + 1}, {use.branch}: {word}, {blocks}{residual}"
