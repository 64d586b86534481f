"""Whether a request fits this machine, or a GPU that is planned for, and which flags would help."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wancli.catalog.random import known_spec
from wancli.catalog.specs import SPECS, ModelSpec
from wancli.config.presets import find_preset, layers
from wancli.config.resolve import Layer, SettingsT, resolve
from wancli.config.settings import RolloutSettings, Settings, VideoShape
from wancli.cost.devices import Device
from wancli.cost.estimate import Estimate, estimate, resolve_device
from wancli.cost.totals import generation_cost, rollout_cost
from wancli.errors import UsageError, WancliError
from wancli.planning.inputs import NO_INPUTS, add_required_inputs
from wancli.planning.plan import Plan, make_plan, make_rollout_plan
from wancli.utils.units import duration, gib

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
# A tiny decoder shows, and may have to be pulled first: a hint names it, no job changes to it.
_TINY: tuple[Mapping[str, Any], ...] = (
    {"vae_decoder": "tiny"},
    {"dtype": "bfloat16", "vae_decoder": "tiny"},
    {"dtype": "bfloat16", "quantize": "int8", "vae_decoder": "tiny"},
)
_LEAST = (REMEDIES[-1], _TINY[-1])  # memory at one size; the two do not go together
_SIZES = tuple({"width": w, "height": h} for w, h in ((832, 480), (640, 352), (448, 256)))
SMALLER = tuple(
    {**size, **machine}
    for size in _SIZES
    for machine in (
        {}, {"vae_tiling": True}, {"dtype": "bfloat16"}, REMEDIES[-1], _TINY[0],
        _TINY[-1],
    )
)  # fmt: skip


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

    @property
    def verdict(self) -> str:
        """Whether the request fits, what it needs and how long it takes, in words."""
        if self.estimate is None:
            return "its shape is not known before it is downloaded"
        estimate, device = self.estimate, self.estimate.device
        how = "" if estimate.offload == "none" else f" with `offload {estimate.offload}`"
        fits = "fits" if estimate.sufficient else "does not fit"
        time = f", about {duration(estimate.total_s)}" if estimate.total_s else ""
        needs = f"needs {gib(estimate.needed)} of {gib(device.total)} ({device.name})"
        return f"{fits}{how}: {needs}{time}"

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


@dataclass(frozen=True)
class DefaultCapacity:
    """A model's check with its own preset, and the video of that preset.

    Where the preset is broken, say by another of its name, `problem` says how.
    """

    model: str
    capacity: CapacityCheck
    video: VideoShape | None = None
    problem: str = ""


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
    spec: ModelSpec,
    plan: Callable[[Settings], Plan],
    offloads: Sequence[str] | None = None,
    gpu: Device | None = None,
) -> Callable[[Settings], Estimate | None]:
    """A function that estimates a video on this machine, or on `gpu`.

    `offloads` overrides the plan's.
    """

    def estimator(settings: Settings) -> Estimate | None:
        planned, (device, wide) = plan(settings), resolve_device(settings.machine, gpu)
        cost = generation_cost(settings, spec, planned, wide=wide, kind=device.kind)
        modes = planned.offloads if offloads is None else offloads
        return estimate(cost, settings.machine, device, modes) if cost else None

    return estimator


def check_default_capacity(
    model: str, spec: ModelSpec, gpu: Device | None = None
) -> DefaultCapacity:
    """Check one video, or rollout, with the model's own preset, with any pictures it requires."""
    known = known_spec(model)
    check = _check_clip if spec.clips else _check_rollout
    try:
        preset = layers(find_preset(known.name)) if known else []
        return check(spec, [*preset, Layer("model", {"model": model})], gpu)
    except UsageError as error:  # also of a local folder, which has no preset
        return DefaultCapacity(model, CapacityCheck(spec, None), problem=str(error))


def _check_clip(spec: ModelSpec, default: Sequence[Layer], gpu: Device | None) -> DefaultCapacity:
    inputs, settings = add_required_inputs(spec, NO_INPUTS), resolve(default, Settings).settings
    estimator = generation_estimator(spec, lambda s: make_plan(s, spec, inputs), gpu=gpu)
    capacity = check_capacity(settings, spec, estimator, force=False)
    return DefaultCapacity(settings.model, capacity, settings.video)


def _check_rollout(
    spec: ModelSpec, default: Sequence[Layer], gpu: Device | None
) -> DefaultCapacity:
    settings = resolve(default, RolloutSettings).settings

    def estimator(settings: RolloutSettings) -> Estimate | None:
        plan, (device, wide) = (
            make_rollout_plan(settings, spec),
            resolve_device(settings.machine, gpu),
        )
        cost = rollout_cost(settings, spec, plan, wide=wide, kind=device.kind)
        return estimate(cost, settings.machine, device, plan.offloads) if cost else None

    frames = make_rollout_plan(settings, spec).num_frames
    capacity = check_capacity(settings, spec, estimator, force=False)
    video = settings.video.model_copy(update={"num_frames": frames})
    return DefaultCapacity(settings.model, capacity, video)


def check_models(gpu: Device | None = None) -> list[DefaultCapacity]:
    """Every known model with its own preset, on this machine or on `gpu`."""
    return [check_default_capacity(name, spec, gpu) for name, spec in SPECS.items()]


def _remedy(settings: SettingsT, estimator: Callable[[SettingsT], Estimate | None]) -> str:
    """The first flags under which the request would fit; "" if none suffice."""
    least = ({**_SIZES[-1], **machine} for machine in _LEAST)
    if all(_fits(settings, c, estimator) is False for c in least):  # then nothing does
        return ""
    candidates = (*REMEDIES, *_TINY, *SMALLER)
    fitting = (c for c in candidates if _fits(settings, c, estimator))
    return in_words(next(fitting, {}))


def savings(estimate: Estimate) -> Iterator[Mapping[str, Any]]:
    """Settings that may need less memory than an estimate says, the least lossy first."""
    possible = list(estimate.possible)
    yield from ({"offload": mode} for mode in possible[possible.index(estimate.offload) + 1 :])
    yield from REMEDIES


def savings_in_words(settings: SettingsT, estimator: Callable[[SettingsT], Estimate | None]) -> str:
    """Settings that let a request need less memory than it does; "" if none are known.

    The least lossy one, and a tiny decoder.
    """
    if (before := estimator(settings)) is None:
        return ""

    def helps(changes: Mapping[str, Any]) -> bool:
        after = _estimated(settings, changes, estimator)
        return after is not None and after.needed < before.needed

    firsts = [next(filter(helps, changes), {}) for changes in (savings(before), _TINY[:1])]
    return ", ".join(in_words(first) for first in firsts if first)


def _fits(
    settings: SettingsT,
    changes: Mapping[str, Any],
    estimator: Callable[[SettingsT], Estimate | None],
) -> bool | None:
    """Whether a request fits with other settings; None if they are incompatible, or larger."""
    after = _changed(settings, changes).video
    if after.width * after.height > settings.video.width * settings.video.height:
        return None
    result = _estimated(settings, changes, estimator)
    return result.sufficient if result else None


def _estimated(
    settings: SettingsT,
    changes: Mapping[str, Any],
    estimator: Callable[[SettingsT], Estimate | None],
) -> Estimate | None:
    """The estimate of a request with other settings; None if they are incompatible."""
    try:
        return estimator(_changed(settings, changes))
    except WancliError:  # a package that is missing, say, or a decoder whose file is broken
        return None


def _changed(settings: SettingsT, changes: Mapping[str, Any]) -> SettingsT:
    """The settings with other values of `machine` and `video`."""
    groups = {
        table: group.model_copy(
            update={n: v for n, v in changes.items() if n in type(group).model_fields}
        )
        for table, group in (("machine", settings.machine), ("video", settings.video))
    }
    return settings.model_copy(update=groups)


def in_words(changes: Mapping[str, Any]) -> str:
    """Settings and their values as errors name them."""
    words = [
        f"`{name}`" if value is True else f"`{name} {value}`"
        for name, value in changes.items()
        if name not in ("width", "height")
    ]
    size = [f"`size {changes['width']}x{changes['height']}`"] if "width" in changes else []
    return " ".join([*size, *words])
