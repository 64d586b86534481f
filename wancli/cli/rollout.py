"""`wancli rollout`."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wancli.cli.help import INPUTS
from wancli.cli.options import (
    OF_TASKS,
    OUTPUT,
    DryRun,
    Folder,
    Output,
    OutputOptions,
    Overwrite,
    PresetName,
    Prompt,
    PromptFlag,
    folder,
    read_prompt,
    takes_options_of,
    takes_output_options,
    takes_settings,
)
from wancli.config.resolve import Layer
from wancli.config.settings import RolloutSettings

if TYPE_CHECKING:
    from wancli.cli.plan_table import Planned
    from wancli.cli.screen import Screen
    from wancli.cost.devices import Device

RESEARCH, AGAIN = "Research", "Resuming"
PROMPT_KV = ("prompt_kv", "kv_align", "free_kv_weights")  # rollouts always compute a prompt once
At = Annotated[
    list[str] | None,
    typer.Option(
        "--at", metavar="CHUNK PROMPT",
        help="Change the prompt from this chunk on; repeatable.",
    ),
]  # fmt: skip
Script = Annotated[Path | None, typer.Option(help="TOML or JSONL file of prompt changes.")]
Image = Annotated[
    Path | None,
    typer.Option(
        "--image", "-i", rich_help_panel=INPUTS, help="Picture to start from: the first frame."
    ),
]
Extend = Annotated[
    Path | None,
    typer.Option(rich_help_panel=INPUTS, help="MP4 to continue; all of it is encoded first."),
]
OnlyNew = Annotated[
    bool,
    typer.Option(
        "--only-new",
        rich_help_panel=INPUTS,
        help="Leave the frames of --image or --extend out of the video.",
    ),
]
Initial = Annotated[
    Path | None,
    typer.Option(rich_help_panel=RESEARCH, help="Clean latents to start from."),
]
NoiseFile = Annotated[
    Path | None,
    typer.Option(rich_help_panel=RESEARCH, help="Safetensors: noise [F,C,H,W], renoise [N,C,H,W]."),
]
Embeds = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=RESEARCH, help="Safetensors: prompt_embeds [1,L,D], negative_embeds."
    ),
]
SaveLatents = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", rich_help_panel=RESEARCH,
        help="Write all latents [F,C,H,W], from the start.",
    ),
]  # fmt: skip
NoVideo = Annotated[
    bool,
    typer.Option(
        "--no-video", rich_help_panel=RESEARCH, help="Generate latents only, without a VAE."
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", rich_help_panel=AGAIN, help="Continue an interrupted rollout, or add chunks."
    ),
]
Rerender = Annotated[
    int | None,
    typer.Option(min=0, rich_help_panel=AGAIN, help="Render this chunk and all after it again."),
]
Seed = Annotated[
    str | None,
    typer.Option("--seed", "-s", metavar="SEED", show_default="random", help="Seed of the noise."),
]
ReportFile = Annotated[
    str | None,
    typer.Option(
        "--report", metavar="FILE", rich_help_panel=OUTPUT, help="Write an HTML report on drift."
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force", help="Run a model not trained for rollout, or one that does not fit in memory."
    ),
]


@takes_settings(RolloutSettings, without=("num_frames", *PROMPT_KV, *OF_TASKS))
def plan_rollout(  # noqa: PLR0913 - one parameter per flag that is not a setting
    *,
    overrides: Layer,
    screen: "Screen",
    gpu: "Device | None" = None,
    prompt: Prompt = None,
    prompt_flag: PromptFlag = None,
    preset: PresetName = None,
    seed: Seed = None,
    at: At = None,
    script: Script = None,
    image: Image = None,
    extend: Extend = None,
    only_new: OnlyNew = False,
    initial_latents: Initial = None,
    noise_file: NoiseFile = None,
    prompt_embeds: Embeds = None,
    save_latents: SaveLatents = None,
    no_video: NoVideo = False,
    resume: Resume = False,
    rerender: Rerender = None,
    output: Output = None,
    output_dir: Folder = None,
    overwrite: Overwrite = False,
    report: ReportFile = None,
    force: Force = False,
) -> "Planned":
    """Plan the rollout that the flags ask for. Raises what is wrong with them."""
    from wancli.config.layers import resuming_layers, settings_layers
    from wancli.planning.context import ContextFiles
    from wancli.planning.prompts import parse_change, read_script
    from wancli.rollouts.request import RolloutRequest
    from wancli.rollouts.session import open_session

    again = resume or rerender is not None
    needs_prompt = not (again or prompt_embeds)
    text = read_prompt(prompt, prompt_flag) if needs_prompt or prompt or prompt_flag else None
    changes = [parse_change(words) for words in at or []]
    changes += read_script(script) if script else []
    request = RolloutRequest(
        prompt=text,
        seed=seed,
        changes=changes,
        starts=ContextFiles(image, extend, initial_latents, noise_file, prompt_embeds),
        latents=save_latents,
        output=output,
        folder=folder(output_dir),
        video=not no_video,
        only_new=only_new,
        overwrite=overwrite,
        resume=resume,
        rerender=rerender,
        report=report,
        force=force,
    )
    layers = partial(settings_layers, screen.warn, overrides, preset)
    return open_session(request, layers, partial(resuming_layers, overrides, preset), gpu=gpu)


@takes_output_options
@takes_options_of(plan_rollout)
def rollout(*, output_options: OutputOptions, dry_run: DryRun = False, **options: Any) -> None:
    """Generate a video of any length, chunk by chunk, in constant memory.

    wancli rollout "a red circle moving right on a black background" --chunks 20 --seed 1
    """
    from wancli.cli.plan_table import carry_out
    from wancli.cli.screen import Screen
    from wancli.utils.threads import choose_pages

    screen = Screen(output_options)
    choose_pages()
    carry_out(plan_rollout(screen=screen, **options), screen, dry_run=dry_run)
