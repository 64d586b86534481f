"""Whether a request fits this machine, and which flags would make it fit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from wancli.catalog.random import known_spec
from wancli.catalog.specs import ModelSpec
from wancli.config.presets import find_preset, layers
from wancli.config.resolve import Layer, flag, resolve
from wancli.config.settings import Settings
from wancli.cost.estimate import Estimate, estimate, here
from wancli.cost.totals import generation_cost
from wancli.errors import SetupError, UsageError
from wancli.planning.inputs import NO_INPUTS, assume
from wancli.planning.plan import Plan, make_plan

Kind = TypeVar("Kind", bound=Settings)


# What spares memory, the least loss first.
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
    """What a request takes on this machine; no estimate where the model's shape is not known."""

    spec: ModelSpec
    estimate: Estimate | None
    force: bool = False
    remedy: str = ""  # flags under which it would fit

    @property
    def offload(self) -> str:
        """What it is made under; nothing is offloaded where the shape is not known."""
        return self.estimate.offload if self.estimate else "none"

    def settled(self, settings: Kind) -> Kind:
        """The settings, with what `--offload auto` comes to."""
        machine = settings.machine
        if machine.offload != "auto":
            return settings
        machine = machine.model_copy(update={"offload": self.offload})
        return settings.model_copy(update={"machine": machine})

    def check(self) -> None:
        """Raise CapacityError where it cannot fit, unless it is forced."""
        if self.estimate and not self.force:
            self.estimate.check(self.spec.name, self.remedy)


def check_capacity(
    settings: Kind, spec: ModelSpec, estimated: Callable[[Kind], Estimate | None], *, force: bool
) -> CapacityCheck:
    """What a request takes here; where that does not fit, with what would help."""
    held = estimated(settings)
    fits = force or held is None or held.enough
    return CapacityCheck(spec, held, force, "" if fits else _remedy(settings, estimated))


def generation(
    spec: ModelSpec, plan: Callable[[Settings], Plan], offloads: Sequence[str] | None = None
) -> Callable[[Settings], Estimate | None]:
    """What holds a video of some settings against this machine.

    It is made under one of the plan's `offloads`, or of those that are given.
    """

    def estimated(settings: Settings) -> Estimate | None:
        planned, (device, wide) = plan(settings), here(settings.machine)
        cost = generation_cost(settings, spec, planned, wide=wide)
        ways = planned.offloads if offloads is None else offloads
        return estimate(cost, settings.machine, device, ways) if cost else None

    return estimated


def check_default_capacity(model: str, spec: ModelSpec) -> CapacityCheck:
    """What one video takes by the model's own preset, of any pictures it needs."""
    known = known_spec(model)
    preset = layers(find_preset(known.name)) if known else []
    settings = resolve([*preset, Layer("model", {"model": model})], Settings).settings
    estimated = generation(spec, lambda s: make_plan(s, spec, assume(spec, NO_INPUTS)))
    try:
        return CapacityCheck(spec, estimated(settings))
    except UsageError:  # a folder nobody made a preset for
        return CapacityCheck(spec, None)


def _remedy(settings: Kind, estimated: Callable[[Kind], Estimate | None]) -> str:
    """The first flags under which it would fit; "" where none of them are enough."""
    for changes in REMEDIES:
        machine = settings.machine.model_copy(update=changes)
        try:
            held = estimated(settings.model_copy(update={"machine": machine}))
        except (UsageError, SetupError):  # it does not go with the rest, or needs a package
            continue
        if held and held.enough:
            flags = {flag(name): value for name, value in changes.items()}
            return " ".join(n if value is True else f"{n} {value}" for n, value in flags.items())
    return ""
