"""`wancli plan`: the options of generate, and with --chunks those of rollout; loads nothing."""

import inspect
from dataclasses import replace
from typing import Any

from wancli.cli.generate import generate
from wancli.cli.options import Command, OutputOptions, takes_output_options
from wancli.cli.rollout import rollout
from wancli.config.resolve import flag
from wancli.errors import UsageError

UNNAMED = "video"  # names the file where there is no prompt


def _options(command: Command) -> dict[str, inspect.Parameter]:
    """What a command takes, beside its talk, and that it is dry."""
    inner = command.__wrapped__  # type: ignore[attr-defined]
    return {n: p for n, p in inspect.signature(inner).parameters.items() if n != "dry_run"}


_GENERATE, _ROLLOUT = _options(generate), _options(rollout)


def _plan(*, talk: OutputOptions, **given: Any) -> None:
    """Say what a video would take, and whether it fits; load nothing.

    Takes the options of generate, and with --chunks those of rollout. Exit 5 where it cannot fit.

    wancli plan --model wan2.1-t2v-14b --size 832x480
    """
    rolls = given["chunks"] is not None
    command, own = (rollout, _ROLLOUT) if rolls else (generate, _GENERATE)
    for name, value in given.items():
        if name not in own and value not in (None, False, [], ()):
            other = "drop --chunks" if rolls else "--chunks N"
            raise UsageError(
                f"{flag(name)} is for {'generate' if rolls else 'rollout'} only.", hint=other
            )
    chosen = {name: value for name, value in given.items() if name in own}
    if chosen["prompt"] is None and chosen["prompt_flag"] is None:
        chosen["prompt"] = UNNAMED
    inner = command.__wrapped__  # type: ignore[attr-defined]
    inner(talk=replace(talk, brief=True), dry_run=True, **chosen)


_plan.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    list((_ROLLOUT | _GENERATE).values())
)
plan = takes_output_options(_plan)
