"""`wancli plan`: the cost of what generate, or with --chunks rollout, would do."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Any

import typer

from wancli.cli.completion import complete_gpus
from wancli.cli.generate import plan_generate
from wancli.cli.options import OutputOptions, options_of, takes_options_of, takes_output_options
from wancli.cli.rollout import plan_rollout
from wancli.errors import UsageError

UNNAMED = "video"  # prompt, which names the file, where there is none
Gpu = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        metavar="GPU",
        autocompletion=complete_gpus,
        help="Plan for this GPU and not for this machine: 24GB, rtx4090, h100, ...",
    ),
]
Models = Annotated[
    bool, typer.Option("--models", help="Plan every known model, each with its own preset.")
]


@takes_output_options
@takes_options_of(plan_rollout, plan_generate)
def plan(
    *, output_options: OutputOptions, gpu: Gpu = None, models: Models = False, **options: Any
) -> None:
    """Estimate what a video needs, and whether it fits; loads nothing.

    Takes the options of generate, and with --chunks those of rollout. Exit 5 if it cannot fit.
    --gpu alone plans every model for that GPU, and --models for this machine.

    wancli plan --model wan2.1-t2v-14b --size 832x480 --gpu 24GB
    """
    from wancli.cli.plan_table import carry_out, show_models
    from wancli.cli.screen import Screen
    from wancli.cost.capacity import check_models
    from wancli.cost.devices import planned_device

    device = planned_device(gpu) if gpu else None
    # False is no element of the tuple, which would have 0 in it, too.
    chosen = {n: v for n, v in options.items() if v not in (None, [], ()) and v is not False}
    if models or (gpu and not chosen):
        _check_alone(chosen)
        show_models(check_models(device), Screen(output_options))
        return
    is_rollout = "chunks" in chosen
    build = plan_rollout if is_rollout else plan_generate
    own = options_of(build)
    for name in chosen:
        if name not in own:
            raise UsageError(
                f"`{name}` is for {'generate' if is_rollout else 'rollout'} only.",
                hint="drop `chunks`" if is_rollout else "`chunks N`",
            )
    values = {name: value for name, value in options.items() if name in own}
    if values["prompt"] is None and values["prompt_flag"] is None:
        values["prompt"] = UNNAMED
    screen = Screen(replace(output_options, brief=True))
    carry_out(build(screen=screen, gpu=device, **values), screen, dry_run=True)


def _check_alone(chosen: Iterable[str]) -> None:
    """Raise UsageError for options beside `models`, which plans each model with its own preset."""
    for name in chosen:
        raise UsageError(
            f"`models` plans every model with its own preset, so `{name}` has no effect.",
            hint="drop one of the two",
        )
