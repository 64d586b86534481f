"""Whether a cost fits this machine, and how long it takes there by rates that were measured."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from wancli.config.precision import is_wide, vae_dtype
from wancli.config.settings import Machine
from wancli.cost.devices import Device, find_cpu, find_device
from wancli.cost.totals import Cost
from wancli.errors import CapacityError
from wancli.planning.offload import OFFLOADS
from wancli.planning.rules_machine import check_kind
from wancli.utils.disk import user_cache
from wancli.utils.files import write_whole
from wancli.utils.reading import read_json
from wancli.utils.units import gib

RATES_FILE = "rates.json"
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Rates:
    """What was measured, per second: FLOPs, by dtype, and bytes copied."""

    matmul: Mapping[str, Rate]
    attention: Mapping[str, Rate]
    convolution: Rate  # of a VAE's blocks in float32, whatever they do beside
    small_convolution: Rate  # the same
    copy: Rate
    measured: str = ""  # when, ISO 8601


@dataclass(frozen=True)
class Estimate:
    """A cost on a device. Seconds are None where its rates were never measured."""

    cost: Cost
    machine: Machine
    device: Device
    offload: str  # that it is made under
    fits: Mapping[str, bool]  # by offload
    possible: Sequence[str]  # offloads that go together with the rest
    ram: int  # bytes of RAM, which hold the weights that are not on the device
    seconds: Mapping[str, float] | None  # by phase

    def as_json(self) -> dict[str, Any]:
        """Numbers by name."""
        told = {"fits": dict(self.fits), "seconds": self.seconds and dict(self.seconds)}
        device = {"device": asdict(self.device), "offload": self.offload}
        return self.cost.as_json() | device | told

    @property
    def enough(self) -> bool:
        """Whether it fits under the offload that it is made under."""
        return self.fits[self.offload]

    @property
    def needed(self) -> int:
        """Bytes on the device at once, under that offload."""
        return self.cost.resident(self.offload)

    @property
    def total_s(self) -> float | None:
        """Seconds of all phases."""
        return sum(self.seconds.values()) if self.seconds else None

    def check(self, model: str, remedy: str = "") -> None:
        """Raise CapacityError where it cannot fit; under the flags of `remedy` it would."""
        if self.enough:
            return
        needed, there, where = self.needed, self.device.total, self.device.name
        if needed <= there:
            needed, there, where = sum(self.cost.weights.values()), self.ram, "the RAM they wait in"
        how = "" if self.offload == "none" else f" under --offload {self.offload}"
        raise CapacityError(
            f"{model} at this size takes {gib(needed)} at once{how}, and {where} has {gib(there)}.",
            hint=f"{self._hint(remedy)}; --force tries it",
        )

    def _hint(self, remedy: str) -> str:
        """What would make it fit."""
        if other := next((offload for offload in self.possible if self.fits[offload]), None):
            return f"--offload {other}"
        least = list(self.possible)[-1]
        weights = max(self.cost.held[least].values())  # which no smaller video spares
        smaller = "a smaller --size, fewer --num-frames or another --model"
        others = "another --model" if weights > self.device.total else smaller
        return f"{remedy}, or {others}" if remedy else others


def estimate(
    cost: Cost,
    machine: Machine,
    device: Device,
    offloads: Sequence[str] = tuple(OFFLOADS),
    *,
    ram: int | None = None,
) -> Estimate:
    """Hold a cost against a device; `offloads` are those to choose from. `ram` is this machine's.

    Only of a CUDA GPU is anything offloaded: other devices compute in RAM.
    """
    ram = find_cpu().total if ram is None else ram
    there = ram >= sum(cost.weights.values())
    ways = list(OFFLOADS) if device.kind == "cuda" else ["none"]
    fits = {n: cost.resident(n) <= device.total and (n == "none" or there) for n in ways}
    possible = [offload for offload in ways if offload in offloads]
    chosen: str = machine.offload
    if chosen == "auto":
        chosen = next((offload for offload in possible if fits[offload]), possible[-1])
    dtype = "float32" if is_wide(machine, device.kind) else _narrow(machine)
    rates = read_rates(device)
    spent = seconds(cost, rates, dtype, vae=vae_dtype(machine)) if rates else None
    return Estimate(cost, machine, device, chosen, fits, possible, ram, spent)


def here(machine: Machine) -> tuple[Device, bool]:
    """The device that settings come to, and whether it will compute in float32.

    Raises PlanError for what that device cannot do.
    """
    device = find_device(machine)
    check_kind(machine, device.kind)
    return device, is_wide(machine, device.kind)


def seconds(
    cost: Cost, rates: Rates, dtype: str, *, vae: str = "float32"
) -> dict[str, float] | None:
    """By phase; None where that dtype was not measured.

    Moving weights takes time that is not counted; convolutions are taken to be as slow as in
    float32.
    """
    if not {dtype, vae} <= rates.matmul.keys() & rates.attention.keys():
        return None
    spent = {}
    for phase, work in cost.work.items():
        kind = vae if phase == "decode" else dtype
        spent[phase] = (
            work.matmul / rates.matmul[kind]
            + work.attention / rates.attention[kind]
            + work.convolution / rates.convolution
            + work.small_convolution / rates.small_convolution
            + cost.moved.get(phase, 0) / rates.copy
        )
    return spent


def read_rates(device: Device) -> Rates | None:
    """What `wancli doctor --measure` found on that device with this torch, if it ever ran."""
    try:
        known = read_json(user_cache() / RATES_FILE)
        return TypeAdapter(Rates).validate_python(known[device.key])
    except (OSError, ValueError, KeyError):
        return None


def write_rates(device: Device, rates: Rates) -> None:
    """Keep what was measured, beside that of other devices. Raises OutputError."""
    path = user_cache() / RATES_FILE
    try:
        kept = read_json(path)
    except (OSError, ValueError):
        kept = {}
    text = json.dumps({**kept, device.key: asdict(rates)}, indent=2) + "\n"
    hint = "set WANCLI_CACHE_DIR to a folder that can be written"
    write_whole(path, text.encode(), hint=hint, overwrite=True)


def _narrow(machine: Machine) -> str:
    return "bfloat16" if machine.dtype == "auto" else machine.dtype
