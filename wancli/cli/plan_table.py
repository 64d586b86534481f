"""The plan and cost of a request as tables and JSON: `wancli plan` and `--dry-run`."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from wancli.catalog.hub_cache import cache_folder, find_cached
from wancli.catalog.specs import ModelSpec, WeightFile
from wancli.catalog.tasks import TEXT
from wancli.cli.messages import with_flags
from wancli.cli.screen import Screen
from wancli.cli.settings_table import in_words, settings_rows
from wancli.cost.capacity import CapacityCheck, DefaultCapacity
from wancli.cost.devices import find_cpu
from wancli.cost.estimate import Estimate
from wancli.errors import PlanWarning
from wancli.planning.lora import LoraUse
from wancli.planning.plan import unused_settings
from wancli.records.progress import Observer, report_warnings
from wancli.records.record import Request
from wancli.utils.disk import free_disk
from wancli.utils.reading import DTYPE_NAMES
from wancli.utils.units import duration, flops, gib

Rows = list[tuple[str, str, str, str]]
_MOST_OUTPUTS = 100  # in a table
_WIDEST = 60  # characters of a value, such as a negative prompt; --json has all
SHOWN_ELSEWHERE = ("lora", "segment_frames")  # in the cost's table, in the settings below
MEASURE = "no times yet: wancli doctor --measure"
MEASURE_THERE = "no times: wancli doctor --measure on that GPU"


def default_json(capacity: CapacityCheck) -> dict[str, Any]:
    """Whether the request fits on this machine, for `--json`."""
    if capacity.estimate is None:
        return {"here": None}
    estimate = capacity.estimate
    return {
        "here": {
            "device": estimate.device.name,
            "device_bytes": estimate.device.total,
            "offload": estimate.offload,
            "bytes": estimate.needed,
            "fits": estimate.sufficient,
            "seconds": estimate.total_s,
        }
    }


def models_rows(checks: Sequence[DefaultCapacity]) -> list[tuple[str, ...]]:
    """A row per model: name, size, memory, time, and whether it fits or what would help."""
    rows: list[tuple[str, ...]] = []
    for check in checks:
        video, estimate = check.video, check.capacity.estimate
        if video is None or estimate is None:
            rows.append((check.model, "", "", "", f"not known: {with_flags(check.problem)}"))
            continue
        size = f"{video.width}x{video.height}, {video.num_frames}"
        time = duration(estimate.total_s) if estimate.total_s else ""
        fits = _fits(estimate, check.capacity.remedy)
        rows.append((check.model, size, gib(estimate.needed), time, fits))
    return rows


def _fits(estimate: Estimate, remedy: str) -> str:
    """`yes`, how, or `no` and the flags that would help."""
    if estimate.sufficient:
        ram = "" if estimate.device.here else f", {gib(estimate.ram)} RAM"
        return "yes" if estimate.offload == "none" else f"yes, {estimate.offload} offload{ram}"
    if estimate.needed <= estimate.device.total:
        return f"no: needs {gib(sum(estimate.cost.weights.values()))} RAM"
    return f"no; yes with {with_flags(remedy)}" if remedy else "no"


def models_json(check: DefaultCapacity) -> dict[str, Any]:
    """The same for `--json`."""
    names = ("width", "height", "num_frames")
    size = {name: getattr(check.video, name, None) for name in names}
    remedy, problem = with_flags(check.capacity.remedy), with_flags(check.problem)
    here = default_json(check.capacity)["here"] or {"fits": None}
    return {"model": check.model, **size, **here, "remedy": remedy, "problem": problem}


def show_models(checks: Sequence[DefaultCapacity], screen: Screen) -> None:
    """Print which models fit."""
    if screen.options.json:
        for check in checks:
            screen.json(models_json(check))
        return
    if device := next((c.capacity.estimate.device for c in checks if c.capacity.estimate), None):
        screen.note(f"{device.name}, {gib(device.total)}; each model with its own preset")
    rows = models_rows(checks)
    timed = any(row[3] for row in rows)
    time = ("time",) if timed else ()
    rows = rows if timed else [(*row[:3], row[4]) for row in rows]
    screen.table("model", "size, frames", "needs", *time, "fits", rows=rows, right=("needs", *time))
    if device and not timed:
        screen.note(MEASURE if device.here else MEASURE_THERE)


def cost_json(estimate: Estimate | None, spec: ModelSpec, output: Path) -> dict[str, Any]:
    """The cost for `--json`; null where the model's shape is unknown."""
    if estimate is None:
        return {"cost": None}
    ram = find_cpu() if estimate.device.here else None
    disk = {"output_free": free_disk(output), "download_free": free_disk(cache_folder())}
    downloads = spec.on_hub and not is_downloaded(spec)
    cost = estimate.as_json() | {"downloads": downloads, "disk": disk}
    return {"cost": cost | {"ram": ram and {"total": ram.total, "free": ram.free}}}


def cost_rows(estimate: Estimate | None, spec: ModelSpec, output: Path) -> Rows:
    """Rows of a compact table: group, name, amount, remark."""
    if estimate is None:
        why = f"the shape of {spec.name} is not known before it is downloaded"
        return [("cost", "unknown", "", why)]
    cost = estimate.cost
    rows = [("parameters", n, f"{count:,}", "") for n, count in cost.parameters.items()]
    each = cost.work["denoise"].flops / cost.forwards
    rows.append(("forward", "tokens", f"{cost.tokens:,}", flops(each)))
    spent = estimate.seconds
    for phase, work in cost.work.items():
        time = duration(spent[phase]) if spent else ""
        rows.append(("compute", phase, flops(work.flops), time))
    total = f"about {duration(estimate.total_s)}" if estimate.total_s else ""
    rows.append(("compute", "total", flops(cost.flops), total))
    rows += [("memory", f"weights: {n}", gib(size), "") for n, size in cost.weights.items()]
    caches = [(name.replace("_", " "), size) for name, size in cost.cache_bytes.items() if size]
    rows += [("memory", name, gib(size), "") for name, size in caches]
    rows += [("memory", f"activations: {n}", gib(size), "") for n, size in cost.activations.items()]
    for offload, fits in estimate.fits.items():
        verdict = "fits" if fits else "does not fit"
        chosen = fits and offload == estimate.offload and len(estimate.fits) > 1
        verdict += ": chosen" if chosen else ""
        rows.append(("peak", f"offload {offload}", gib(cost.resident(offload)), verdict))
    return rows + _device_rows(estimate) + _disk_rows(estimate, spec, output)


def _device_rows(estimate: Estimate) -> Rows:
    """Memory of the device and RAM, or what a GPU that is only planned for needs beside it."""
    device, ram = estimate.device, find_cpu()
    if not device.here:
        rows = [(device.kind, device.name, gib(device.total), "")]
        needed = ("RAM", "for offloaded weights", gib(estimate.ram), "needed")
        return rows if estimate.offload == "none" else [*rows, needed]
    rows = [(device.kind, device.name, gib(device.total), f"{gib(device.free)} free")]
    if device.kind == "cuda":
        rows.append(("RAM", "", gib(ram.total), f"{gib(ram.free)} free"))
    return rows


def is_downloaded(spec: ModelSpec) -> bool:
    """Whether the hub's cache has the whole model, but for what is read from other files."""
    from wancli.models.inspect import missing_files

    if (cached := find_cached(spec.repo)) is None:
        return False
    return all(spec.file_of(name.partition("/")[0]) for name in missing_files(cached))


def _disk_rows(estimate: Estimate, spec: ModelSpec, output: Path) -> Rows:
    cost, free = estimate.cost, f"{gib(free_disk(output))} free"
    rows = [("disk", "video, about", gib(cost.output), free)]
    if cost.store:
        rows.append(("disk", "clean chunks", gib(cost.store), ""))
    if spec.on_hub:
        there = (
            "already downloaded"
            if is_downloaded(spec)
            else f"{gib(free_disk(cache_folder()))} free"
        )
        low, high = (gib(size) for size in cost.download)
        rows.append(("disk", "download", f"{low} to {high}", there))
    return rows


class Planned(Protocol):
    """A planned request: videos or a rollout."""

    @property
    def capacity(self) -> CapacityCheck:
        """Its cost on this machine, and whether it fits."""

    @property
    def warnings(self) -> Sequence[PlanWarning]:
        """Warnings to print before it runs."""

    def plan_json(self) -> Mapping[str, Any]:
        """The plan by name."""

    def items(self) -> Sequence[tuple[Request, Path]]:
        """Each request and the path of its output."""

    def check_outputs(self) -> object:
        """Raise what `make` would raise about its outputs; writes and locks nothing."""

    def make(self, observer: Observer) -> list[dict[str, Any]]:
        """Generate all outputs; returns their records."""


def carry_out(planned: Planned, screen: Screen, *, dry_run: bool) -> list[dict[str, Any]]:
    """Run a plan, or with `dry_run` print it. Raises WancliError for one that cannot run."""
    if not dry_run:
        return planned.make(screen)
    show_plan(screen, planned.plan_json(), planned.items(), planned.capacity)
    brief = screen.options.brief  # a plan needs no prompt, and has another word in its place
    report_warnings((w for w in planned.warnings if not (brief and w.of_prompt)), screen)
    planned.capacity.check()
    if not brief:
        planned.check_outputs()
    return []


def show_plan(
    screen: Screen,
    plan: Mapping[str, Any],
    items: Sequence[tuple[Request, Path]],
    capacity: CapacityCheck,
) -> None:
    """Print the cost, the plan, every setting with its source, and the outputs."""
    if screen.options.json:
        for request, output in items:
            cost = cost_json(capacity.estimate, capacity.spec, output)
            planned = {"plan": plan, "request": request.as_json(), **cost}
            screen.json({**planned, "output": {"path": str(output)}})
        return
    uses = [LoraUse(**use) for use in plan["lora"]]
    costs = [("LoRA", f"{use.name}, {use.scale:g}", use.counts, use.drops) for use in uses]
    costs += [_file_row(file) for file in capacity.spec.files]
    costs += cost_rows(capacity.estimate, capacity.spec, items[0][1])
    screen.table("", " ", "amount", "", rows=costs, right=("amount",))
    if capacity.estimate and not capacity.estimate.total_s:
        screen.note(MEASURE if capacity.estimate.device.here else MEASURE_THERE)
    if screen.options.brief:
        return
    request = items[0][0]
    unused = unused_settings(request.settings, plan.get("task", TEXT))
    settings = settings_rows(request.as_json(), request.sources, unused, widest=_WIDEST)
    rows = [*_plan_rows(plan), *settings]
    screen.table("", "value", "from", rows=rows)
    for request, output in items[:_MOST_OUTPUTS]:
        screen.result(f"seed {request.seed}: {output}")
    if more := len(items[_MOST_OUTPUTS:]):
        screen.result(f"and {more:,} more: --json prints them all")


def _file_row(file: WeightFile) -> tuple[str, str, str, str]:
    dtypes = ", ".join(DTYPE_NAMES.get(name, name) for name in file.dtypes)
    note = ""
    if any(name.startswith("F8") for name in file.dtypes):
        note = f"{file.scales:,} scales" if file.scales else "no scales: values as stored"
    if file.packed:
        note = f"{sum(each.bytes for each in file.packed):,} bytes stay quantized"
    return (
        f"weights of {file.part}",
        f"{file.path.name}, {file.bytes:,} bytes",
        f"{file.keys:,} keys, {file.parameters:,} parameters in {dtypes}",
        note,
    )


def _plan_rows(plan: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What follows from the settings; what does not apply is left out."""
    yield "[plan]", "", ""
    for name, value in plan.items():
        if name == "shape":
            size = "{channels} channels, {frames} frames of {width}x{height}".format_map(value)
            yield "  latents", size, ""
        elif name.endswith("_s"):
            yield f"  {name.removesuffix('_s')}", f"{value:.2f} s", ""
        elif value is not None and name not in SHOWN_ELSEWHERE:
            yield f"  {name}", in_words(value), ""
