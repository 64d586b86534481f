"""Settings of a job that need less memory: the steps that a plan which does not fit hints at."""

from collections.abc import Mapping
from typing import Any

from wancli.api.requests import Listener
from wancli.batches.jobs import adapted, plan_job
from wancli.cost.capacity import savings
from wancli.cost.estimate import Estimate
from wancli.errors import SetupError, UsageError


def less_memory(command: str, prompt: str | None, values: Mapping[str, Any]) -> dict[str, Any]:
    """The least change of a job's settings by which its plan needs less; empty if there is none.

    First weights wait in RAM, which is exact; then come tiles, dtypes and quantization.
    """
    before = _estimate(command, prompt, values)
    if before is None:
        return {}
    for change in savings(before):
        after = _estimate(command, prompt, adapted(values, change))
        if after and after.needed < before.needed:
            return dict(change)
    return {}


def _estimate(command: str, prompt: str | None, values: Mapping[str, Any]) -> Estimate | None:
    """What a job needs; None where it cannot work, or nothing is known of its model."""
    try:
        return plan_job(command, prompt, values, Listener(None)).capacity.estimate
    except (UsageError, SetupError):
        return None
