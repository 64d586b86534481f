"""Warn of a folder: the settings of its model's authors do not apply by themselves."""

from typing import Any

from wancli.catalog.specs import SPECS, ModelSpec
from wancli.config.resolve import Resolved
from wancli.errors import PlanWarning

_SIGN = "sampling.flow_shift"  # which no model does well with another's


def missing_preset_warnings(spec: ModelSpec, resolved: Resolved[Any]) -> tuple[PlanWarning, ...]:
    """A warning that a folder is used with the declared defaults, or none."""
    if spec.folder is None or spec.name in SPECS or resolved.sources[_SIGN] != "default":
        return ()
    kin = [known.name for known in SPECS.values() if _is_kin(known, spec)]
    if not kin:
        return ()
    text = (
        f"{spec.folder.name} has no preset: shift, guidance and negative prompt are general "
        f"defaults. It is built as {' and '.join(kin)}."
    )
    return (PlanWarning(text, " or ".join(f"`preset {name}`" for name in kin)),)


def _is_kin(known: ModelSpec, spec: ModelSpec) -> bool:
    """Whether a known model is built like another, and not distilled or made for rollouts."""
    original = known.clips and not known.causal and known.checkpoint is None
    return (
        original
        and known.architecture == spec.architecture
        and (known.tasks[0], known.experts, known.boundary_ratio, known.per_token_time)
        == (spec.tasks[0], spec.experts, spec.boundary_ratio, spec.per_token_time)
    )
