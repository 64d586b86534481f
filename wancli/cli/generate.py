"""`wancli generate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wancli.cli.options import (
    OUTPUT,
    CachePreset,
    DryRun,
    Folder,
    Force,
    Output,
    OutputOptions,
    Overwrite,
    PresetName,
    Prompt,
    PromptFlag,
    Seed,
    folder,
    read_prompt,
    takes_inputs,
    takes_options_of,
    takes_output_options,
    takes_settings,
)
from wancli.config.resolve import Layer, resolve
from wancli.config.settings import Settings

if TYPE_CHECKING:
    from wancli.cli.plan_table import Planned
    from wancli.cli.screen import Screen
    from wancli.cost.devices import Device
    from wancli.planning.inputs import InputFiles

Count = Annotated[
    int | None,
    typer.Option(
        "--num-videos",
        "-N",
        min=1,
        max=10_000,
        help="Number of videos; seeds count up from --seed.",
    ),
]
Skip = Annotated[
    bool,
    typer.Option(
        "--skip-existing",
        rich_help_panel=OUTPUT,
        help="Keep videos that already exist for the same request.",
    ),
]
Latents = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", rich_help_panel=OUTPUT, help="Write the latents too, as safetensors."
    ),
]
Perf = Annotated[Path | None, typer.Option(rich_help_panel=OUTPUT, help="Write timings as JSON.")]
PreviewEvery = Annotated[
    int | None,
    typer.Option(
        min=1, max=1000, rich_help_panel=OUTPUT,
        help="Preview the video every N steps while it is denoised, in NAME.preview.png and in "
        "terminals that display pictures.",
    ),
]  # fmt: skip


@takes_settings(Settings)
@takes_inputs
def plan_generate(  # noqa: PLR0913 - one parameter per flag that is not a setting
    *,
    overrides: Layer,
    inputs: "InputFiles",
    task: str | None,
    screen: "Screen",
    gpu: "Device | None" = None,
    prompt: Prompt = None,
    prompt_flag: PromptFlag = None,
    preset: PresetName = None,
    cachedit_preset: CachePreset = None,
    seed: Seed = None,
    num_videos: Count = None,
    output: Output = None,
    output_dir: Folder = None,
    overwrite: Overwrite = False,
    skip_existing: Skip = False,
    save_latents: Latents = None,
    perf_json: Perf = None,
    preview_every: PreviewEvery = None,
    force: Force = False,
) -> "Planned":
    """Plan the videos that the flags ask for. Raises what is wrong with them."""
    from wancli.config.layers import settings_layers
    from wancli.config.seeds import parse_seeds

    text = read_prompt(prompt, prompt_flag)
    resolved = resolve(settings_layers(screen.warn, overrides, preset, cachedit_preset), Settings)
    seeds = parse_seeds(seed, num_videos)
    # Only what is valid so far needs what follows.
    from wancli.generation.batch import GenerateRequest, OutputFiles, plan_videos

    files = OutputFiles(
        output=output,
        folder=folder(output_dir),
        overwrite=overwrite,
        skip_existing=skip_existing,
        latents=save_latents,
        perf=perf_json,
        preview_every=preview_every,
    )
    request = GenerateRequest("generate", text, seeds, resolved, force, inputs, task)
    return plan_videos(request, files, assume_inputs=screen.options.brief, gpu=gpu)


@takes_output_options
@takes_options_of(plan_generate)
def generate(*, output_options: OutputOptions, dry_run: DryRun = False, **options: Any) -> None:
    """Generate a video from a prompt.

    Some models also take pictures and videos.

    wancli generate "a red circle moving right on a black background" --seed 1
    """
    from wancli.cli.screen import Screen

    screen = Screen(output_options)
    planned = plan_generate(screen=screen, **options)
    from wancli.cli.plan_table import carry_out
    from wancli.utils.heap import keep_heap

    keep_heap()
    carry_out(planned, screen, dry_run=dry_run)
