"""Whether a request fits this machine, and which flags would make it fit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wancli.catalog.random import known_spec
from wancli.catalog.specs import ModelSpec
from wancli.config.presets import find_preset, layers
from wancli.config.resolve import Layer, SettingsT, resolve
from wancli.config.settings import Settings
from wancli.cost.estimate import Estimate, estimate, resolve_device
from wancli.cost.totals import generation_cost
from wancli.errors import SetupError, UsageError
from wancli.planning.inputs import NO_INPUTS, add_required_inputs
from wancli.planning.plan import Plan, make_plan

# Ways to save memory, the least lossy first.
REMEDIES: tuple[Mapping[str, Any], ...] = (
    {"dtype": "bfloat16"},
    {"vae_tiling": True},
    {"vae_dtype": "bfloat16"},
    {"dtype": "bfloat16", "vae_tiling": True},
    {"quantize": "int8"},
    {"dtype": "bfloat16", "quantize": "int8"},
    {"dtype": "bfloat16", "quantize": "int8", "vae_tiling": True},
)


@dataclass(frozen=True)
class CapacityCheck:
    """A request's estimate on this machine; None if the model's architecture is unknown."""

    spec: ModelSpec
    estimate: Estimate | None
    force: bool = False
    remedy: str = ""  # flags under which it would fit

    @property
    def offload(self) -> str:
        """The offload mode used; "none" without an estimate."""
        return self.estimate.offload if self.estimate else "none"

    def with_offload(self, settings: SettingsT) -> SettingsT:
        """The settings, with `offload` "auto" resolved."""
        machine = settings.machine
        if machine.offload != "auto":
            return settings
        machine = machine.model_copy(update={"offload": self.offload})
        return settings.model_copy(update={"machine": machine})

    def check(self) -> None:
        """Raise CapacityError if the request does not fit, unless `force` is set."""
        if self.estimate and not self.force:
            self.estimate.check(self.spec.name, self.remedy)


def check_capacity(
    settings: SettingsT,
    spec: ModelSpec,
    estimator: Callable[[SettingsT], Estimate | None],
    *,
    force: bool,
) -> CapacityCheck:
    """Estimate a request on this machine and, if it does not fit, find flags that would help."""
    result = estimator(settings)
    fits = force or result is None or result.sufficient
    return CapacityCheck(spec, result, force, "" if fits else _remedy(settings, estimator))


def generation_estimator(
    spec: ModelSpec, plan: Callable[[Settings], Plan], offloads: Sequence[str] | None = None
) -> Callable[[Settings], Estimate | None]:
    """A function that estimates a video on this machine; `offloads` overrides the plan's."""

    def estimator(settings: Settings) -> Estimate | None:
        planned, (device, wide) = plan(settings), resolve_device(settings.machine)
        cost = generation_cost(settings, spec, planned, wide=wide)
        modes = planned.offloads if offloads is None else offloads
        return estimate(cost, settings.machine, device, modes) if cost else None

    return estimator


def check_default_capacity(model: str, spec: ModelSpec) -> CapacityCheck:
    """Check one video with the model's own preset, with any pictures it requires."""
    known = known_spec(model)
    preset = layers(find_preset(known.name)) if known else []
    settings = resolve([*preset, Layer("model", {"model": model})], Settings).settings
    estimator = generation_estimator(
        spec, lambda s: make_plan(s, spec, add_required_inputs(spec, NO_INPUTS))
    )
    try:
        return CapacityCheck(spec, estimator(settings))
    except UsageError:  # a local folder without a preset
        return CapacityCheck(spec, None)


def _remedy(settings: SettingsT, estimator: Callable[[SettingsT], Estimate | None]) -> str:
    """The first flags under which the request would fit; "" if none suffice."""
    for changes in REMEDIES:
        machine = settings.machine.model_copy(update=changes)
        try:
            result = estimator(settings.model_copy(update={"machine": machine}))
        except (UsageError, SetupError):  # incompatible, or a package is missing
            continue
        if result and result.sufficient:
            flags = {f"`{name}`": value for name, value in changes.items()}
            return " ".join(n if value is True else f"{n} {value}" for n, value in flags.items())
    return ""
