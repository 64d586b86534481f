"""What a request takes, on the screen: `wancli plan`, `--dry-run`, and the check before a run."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from wancli.cli.screen import Screen
from wancli.cost import generation_cost
from wancli.errors import SetupError, UsageError
from wancli.estimate import Estimate, duration, estimate, flops, gib, here
from wancli.hub_cache import cache_folder, repo_folder
from wancli.inputs import NOTHING, assume
from wancli.inventory import find_cpu, free_disk
from wancli.offload import OFFLOADS
from wancli.plan import Plan, make_plan
from wancli.presets import find_preset, layers
from wancli.random_models import known_spec
from wancli.records import Observer, Request
from wancli.resolve import Layer, flag, resolve
from wancli.settings import Settings
from wancli.specs import ModelSpec
from wancli.vocabulary import HINT

Kind = TypeVar("Kind", bound=Settings)
Rows = list[tuple[str, str, str, str]]
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
MEASURE = "never measured here: wancli doctor --measure"


@dataclass(frozen=True)
class Taken:
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


def take(
    settings: Kind, spec: ModelSpec, estimated: Callable[[Kind], Estimate | None], *, force: bool
) -> Taken:
    """What a request takes here; where that does not fit, with what would help."""
    held = estimated(settings)
    fits = force or held is None or held.enough
    return Taken(spec, held, force, "" if fits else _remedy(settings, estimated))


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


def taken_by_default(model: str, spec: ModelSpec) -> Taken:
    """What one video takes by the model's own preset, of any pictures it needs."""
    known = known_spec(model)
    preset = layers(find_preset(known.name)) if known else []
    settings = resolve([*preset, Layer("model", {"model": model})], Settings).settings
    estimated = generation(spec, lambda s: make_plan(s, spec, assume(spec, NOTHING)))
    try:
        return Taken(spec, estimated(settings))
    except UsageError:  # a folder nobody made a preset for
        return Taken(spec, None)


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


def default_row(taken: Taken) -> str:
    """Whether that fits here; "" where the model's shape is not known."""
    if taken.estimate is None:
        return ""
    held, device = taken.estimate, taken.estimate.device
    how = "" if held.offload == "none" else f" with --offload {held.offload}"
    fits = "fits" if held.enough else "does not fit"
    time = f", about {duration(held.total_s)}" if held.total_s else ""
    return f"{fits}{how}: {gib(held.needed)} at once, of {gib(device.total)} ({device.name}){time}"


def default_json(taken: Taken) -> dict[str, Any]:
    """The same for `--json`."""
    if taken.estimate is None:
        return {"here": None}
    held = taken.estimate
    return {
        "here": {
            "device": held.device.name,
            "device_bytes": held.device.total,
            "offload": held.offload,
            "bytes": held.needed,
            "fits": held.enough,
            "seconds": held.total_s,
        }
    }


def cost_json(estimate: Estimate | None, spec: ModelSpec, output: Path) -> dict[str, Any]:
    """For `--json`; an empty cost where the model's shape is not known."""
    if estimate is None:
        return {"cost": None}
    ram = find_cpu()
    disk = {"output_free": free_disk(output), "download_free": free_disk(cache_folder())}
    downloads = spec.on_hub and not is_downloaded(spec)
    told = estimate.as_json() | {"downloads": downloads, "disk": disk}
    return {"cost": told | {"ram": {"total": ram.total, "free": ram.free}}}


def cost_rows(estimate: Estimate | None, spec: ModelSpec, output: Path) -> Rows:
    """A compact table: what, how much, and a remark."""
    if estimate is None:
        why = f"the shape of {spec.name} is not known before it is downloaded"
        return [("cost", "unknown", "", why)]
    cost, device = estimate.cost, estimate.device
    rows = [("parameters", n, f"{count:,}", "") for n, count in cost.parameters.items()]
    each = cost.work["denoise"].flops / cost.forwards
    rows.append(("forward", "tokens", f"{cost.tokens:,}", flops(each)))
    spent = estimate.seconds
    for phase, work in cost.work.items():
        time = duration(spent[phase]) if spent else ""
        rows.append(("work", phase, flops(work.flops), time))
    total = f"about {duration(estimate.total_s)}" if estimate.total_s else MEASURE
    rows.append(("work", "in all", flops(cost.flops), total))
    rows += [("memory", f"weights of {n}", gib(size), "") for n, size in cost.weights.items()]
    rows += [("memory", n, gib(size), "") for n, size in cost.kept.items() if size]
    rows += [("memory", f"to {n}", gib(size), "") for n, size in cost.activations.items()]
    for offload, fits in estimate.fits.items():
        verdict = "fits" if fits else "does not fit"
        verdict += ": chosen" if offload == estimate.offload and len(estimate.fits) > 1 else ""
        how = "" if offload == "none" else f", {offload} offload"
        rows.append((f"at once{how}", OFFLOADS[offload], gib(cost.resident(offload)), verdict))
    rows.append((device.kind, device.name, gib(device.total), f"{gib(device.free)} free"))
    if device.kind == "cuda":
        ram = find_cpu()
        rows.append(("RAM", "", gib(ram.total), f"{gib(ram.free)} free"))
    return rows + _disk_rows(estimate, spec, output)


def is_downloaded(spec: ModelSpec) -> bool:
    """Whether the hub's cache has some snapshot of the model."""
    folder = repo_folder(spec.repo) / "snapshots"
    return folder.is_dir() and any(folder.iterdir())


def _disk_rows(estimate: Estimate, spec: ModelSpec, output: Path) -> Rows:
    cost, free = estimate.cost, f"{gib(free_disk(output))} free"
    rows = [("disk", "video, about", gib(cost.output), free)]
    if cost.store:
        rows.append(("disk", "clean chunks", gib(cost.store), ""))
    if spec.on_hub:
        there = (
            "is in the cache" if is_downloaded(spec) else f"{gib(free_disk(cache_folder()))} free"
        )
        low, high = (gib(size) for size in cost.download)
        rows.append(("disk", "download", f"{low} to {high}", there))
    return rows


class Planned(Protocol):
    """A request that was planned, of either kind."""

    @property
    def capacity(self) -> Taken:
        """What it takes here."""

    @property
    def warnings(self) -> Sequence[str]:
        """What is to be said of it before it is made."""

    def plan_json(self) -> Mapping[str, Any]:
        """What it comes to, by name."""

    def items(self) -> Sequence[tuple[Request, Path]]:
        """Each request, and the name of its output."""

    def make(self, observer: Observer) -> list[dict[str, Any]]:
        """Make them all; their records."""


def carry_out(planned: Planned, screen: Screen, *, dry_run: bool) -> list[dict[str, Any]]:
    """Make what was planned, or only show the plan. Raises CapacityError where it cannot fit."""
    if dry_run:
        show_plan(screen, planned.plan_json(), planned.items(), planned.capacity)
    planned.capacity.check()
    if not dry_run:
        return planned.make(screen)
    if not screen.talk.brief:
        say_warnings(planned.warnings, screen)
    return []


def say_warnings(warnings: Iterable[str], observer: Observer) -> None:
    """What is to be said of a request, once nothing is wrong with it."""
    for text in warnings:
        observer.warn(text, hint=HINT)


def show_plan(
    screen: Screen, plan: Mapping[str, Any], items: Sequence[tuple[Request, Path]], taken: Taken
) -> None:
    """What would be done: the plan, what it takes, every setting with its source, outputs."""
    if screen.talk.json:
        for request, output in items:
            cost = cost_json(taken.estimate, taken.spec, output)
            told = {"plan": plan, "request": request.as_json(), **cost}
            screen.json({**told, "output": {"path": str(output)}})
        return
    costs = cost_rows(taken.estimate, taken.spec, items[0][1])
    screen.table("", " ", "amount", "", rows=costs, right=("amount",))
    if screen.talk.brief:
        return
    rows = [("plan", key, str(value), "") for key, value in plan.items() if key != "shape"]
    rows += [("plan", f"latent {key}", str(value), "") for key, value in plan["shape"].items()]
    request, told = items[0][0], items[0][0].as_json()
    for key, source in request.sources.items():
        table, _, name = key.rpartition(".")
        rows.append((table, name, str((told[table] if table else told)[name]), source))
    rows += [("request", "seed", str(request.seed), "") for request, _ in items]
    rows += [("request", "output", str(output), "") for _, output in items]
    screen.table("", "", "value", "from", rows=rows)
