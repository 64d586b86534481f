"""`wancli plan`: the cost of what generate, or with --chunks rollout, would do."""

from dataclasses import replace
from typing import Any

from wancli.cli.generate import plan_generate
from wancli.cli.options import OutputOptions, options_of, takes_options_of, takes_output_options
from wancli.cli.rollout import plan_rollout
from wancli.errors import UsageError

UNNAMED = "video"  # prompt, which names the file, where there is none


@takes_output_options
@takes_options_of(plan_rollout, plan_generate)
def plan(*, output_options: OutputOptions, **options: Any) -> None:
    """Estimate what a video needs, and whether it fits; loads nothing.

    Takes the options of generate, and with --chunks those of rollout. Exit 5 if it cannot fit.

    wancli plan --model wan2.1-t2v-14b --size 832x480
    """
    from wancli.cli.plan_table import carry_out
    from wancli.cli.screen import Screen

    is_rollout = options["chunks"] is not None
    build = plan_rollout if is_rollout else plan_generate
    own = options_of(build)
    for name, value in options.items():
        if name not in own and value not in (None, False, [], ()):
            raise UsageError(
                f"`{name}` is for {'generate' if is_rollout else 'rollout'} only.",
                hint="drop `chunks`" if is_rollout else "`chunks N`",
            )
    chosen = {name: value for name, value in options.items() if name in own}
    if chosen["prompt"] is None and chosen["prompt_flag"] is None:
        chosen["prompt"] = UNNAMED
    screen = Screen(replace(output_options, brief=True))
    carry_out(build(screen=screen, **chosen), screen, dry_run=True)
