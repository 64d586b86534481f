"""`wancli bench`: speed and quality of caches against a baseline."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wancli.cli.options import (
    OUTPUT,
    Force,
    OutputOptions,
    Overwrite,
    PresetName,
    takes_inputs,
    takes_output_options,
    takes_settings,
)
from wancli.cli.screen import Screen
from wancli.config.resolve import Layer
from wancli.config.settings import Settings
from wancli.errors import UsageError

if TYPE_CHECKING:
    from wancli.benchmark.cases import Arm, Bench
    from wancli.benchmark.session import BenchRequest
    from wancli.planning.inputs import InputFiles

GOALS, TUNE = "Goals", "Tuning"
COLUMNS = (
    "variant", "denoise", "speed-up", "total", "blocks", "SSIM", "worst", "PSNR", "temporal",
    "motion",
)  # fmt: skip
DECODER_COLUMNS = ("decoder", "decode", "speed-up", "SSIM", "worst", "PSNR", "peak")
Prompts = Annotated[
    list[str],
    typer.Argument(help="Prompts, .txt files with one per line, or a .toml file with everything."),
]
Variants = Annotated[
    list[str] | None,
    typer.Option("--variant", metavar='"NAME: FLAGS"', help="Variant to measure; repeatable."),
]
Seed = Annotated[
    str | None,
    typer.Option(
        "--seed", "-s", metavar="SEEDS", show_default="0", help="Seed, or seeds: 1,2,5 or 0-9."
    ),
]
Folder = Annotated[
    Path,
    typer.Option(
        "--output", "-o", metavar="DIR", rich_help_panel=OUTPUT, help="Directory of the report."
    ),
]
Least = Annotated[
    float | None,
    typer.Option(
        min=0, max=1, rich_help_panel=GOALS,
        help="Exit 7 if the SSIM of any video frame is below this.",
    ),
]  # fmt: skip
Most = Annotated[
    float | None,
    typer.Option(
        min=0, rich_help_panel=GOALS,
        help="Exit 7 if a variant's denoising time is above this fraction of the baseline's.",
    ),
]  # fmt: skip
Decoders = Annotated[
    bool,
    typer.Option(
        "--decoders", help="Compare ways to decode the same latents: fast, tiled, tiny (no caches)."
    ),
]
Tune = Annotated[
    bool,
    typer.Option(
        "--tune", rich_help_panel=TUNE, help="Find the threshold of each variant's step cache."
    ),
]
Target = Annotated[
    float | None,
    typer.Option(
        min=0, max=1, rich_help_panel=TUNE,
        show_default="0.95",
        help="Minimum SSIM of any frame, for --tune.",
    ),
]  # fmt: skip
Save = Annotated[
    str | None,
    typer.Option(
        "--save-preset",
        metavar="NAME",
        rich_help_panel=TUNE,
        help="Name of the preset that --tune saves.",
    ),
]


@takes_output_options
@takes_settings(Settings)
@takes_inputs
def bench(  # noqa: PLR0913 - one parameter per flag that is not a setting
    *,
    overrides: Layer,
    inputs: "InputFiles",
    task: str | None,
    output_options: OutputOptions,
    prompts: Prompts,
    variant: Variants = None,
    preset: PresetName = None,
    seed: Seed = None,
    decoders: Decoders = False,
    output: Folder = Path("bench"),
    overwrite: Overwrite = False,
    fail_under_ssim: Least = None,
    fail_over_ratio: Most = None,
    tune: Tune = False,
    target_ssim: Target = None,
    save_preset: Save = None,
    force: Force = False,
) -> None:
    """Measure the speed and quality of caches against a baseline.

    Same prompts and seeds, interleaved in one process, compared on raw frames.

    wancli bench "a red circle moving right" --variant "fast: --use-cachedit"
    """
    from wancli.benchmark.session import BenchSession, Goals
    from wancli.cli.bench_variants import read_bench_request
    from wancli.config.layers import settings_layers

    request = replace(
        read_bench_request(prompts, seed, variant or [], tune=tune), inputs=inputs, task=task
    )
    if not tune and (target_ssim is not None or save_preset):
        raise UsageError("`target_ssim` and `save_preset` need `tune`.", hint="add `tune`")
    screen = Screen(output_options)
    layers = settings_layers(screen.warn, overrides, preset)
    if decoders:
        if tune or fail_under_ssim is not None or fail_over_ratio is not None:
            raise UsageError("`decoders` has no goals and no `tune`.", hint="drop those flags")
        _bench_decoders(request, layers, output, screen, overwrite=overwrite, force=force)
        return
    target = (0.95 if target_ssim is None else target_ssim) if tune else None
    goals = Goals(fail_under_ssim, fail_over_ratio, target, save_preset)
    session = BenchSession(request, layers, goals)
    measured, page = session.run(output, screen, overwrite=overwrite, force=force)
    _show(measured, page, screen)
    session.judge(measured)


def _bench_decoders(
    request: "BenchRequest", layers: list[Layer], output: Path, screen: Screen, *,
    overwrite: bool, force: bool,
) -> None:  # fmt: skip
    from wancli.benchmark.decoders import DecoderBench

    bench = DecoderBench(request, layers)
    measured = bench.run(output, screen, overwrite=overwrite, force=force)
    if screen.options.json:
        screen.json(measured)
        return
    rows = [_decoder_row(result) for result in measured["decoders"]]
    screen.table(*DECODER_COLUMNS, rows=rows, right=DECODER_COLUMNS[1:])
    screen.note(f"written: {output / 'bench.json'}")


def _decoder_row(result: Mapping[str, Any]) -> tuple[str, ...]:
    same = result["ssim"] is not None and result["psnr_db"] is None
    return (
        result["name"],
        f"{result['decode_s']:.3f} s",
        f"{result['speed_up']:.2f}x",
        "" if result["ssim"] is None else "equal" if same else f"{result['ssim']:.4f}",
        "" if result["ssim"] is None else "equal" if same else f"{result['ssim_worst']:.4f}",
        "" if result["psnr_db"] is None else f"{result['psnr_db']:.1f} dB",
        "" if result["peak_gib"] is None else f"{result['peak_gib']:.2f} GiB",
    )


def _show(bench: "Bench", page: Path, screen: Screen) -> None:
    if screen.options.json:
        screen.json({**bench.as_json(), "report": str(page)})
        return
    rows = [_row(arm) for arm in bench.arms]
    screen.table(*COLUMNS, rows=rows, right=COLUMNS[1:])
    if bench.floor:
        screen.note(
            f"another seed of the baseline: SSIM {bench.floor.ssim:.3f}, "
            f"worst {bench.floor.ssim_worst:.3f}"
        )
    for arm in bench.arms[1:]:
        if arm.reused_nothing:
            screen.warn(
                f"{arm.name}: nothing was reused.", hint="a higher threshold, which `tune` finds"
            )
    screen.note(f"report: {page}")


def _row(arm: "Arm") -> tuple[str, ...]:
    summary = arm.summary
    same = "equal" if summary.equal_latents else ""
    return (
        arm.name,
        f"{summary.denoise_s:.2f} s",
        "no reuse" if arm.does_the_same else f"{summary.denoise_speed_up.median:.2f}x",
        f"{summary.total_s:.2f} s",
        f"{summary.blocks / (summary.blocks_all or 1):.0%}",
        "" if summary.ssim is None else same or f"{summary.ssim:.4f}",
        "" if summary.ssim_worst is None else same or f"{summary.ssim_worst:.4f}",
        "" if summary.psnr_db is None else f"{summary.psnr_db:.1f} dB",
        "" if summary.temporal_levels is None else f"{summary.temporal_levels:.2f}",
        "" if summary.motion is None else f"{summary.motion:.0%}",
    )
