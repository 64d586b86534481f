"""Whether a cost fits this machine, and how long it takes there by rates that were measured."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from wancli.cost import OFFLOADS, Cost
from wancli.errors import CapacityError
from wancli.files import write_whole
from wancli.inventory import Device, find_device, user_cache
from wancli.machine import is_wide
from wancli.settings import Machine

RATES_FILE = "rates.json"


@dataclass(frozen=True)
class Rates:
    """What was measured, per second: FLOPs, by dtype, and bytes copied."""

    matmul: Mapping[str, float]
    attention: Mapping[str, float]
    convolution: float  # of a VAE's blocks in float32, whatever they do beside
    small_convolution: float  # the same
    copy: float
    measured: str = ""  # when, ISO 8601


@dataclass(frozen=True)
class Estimate:
    """A cost on a device. Seconds are None where its rates were never measured."""

    cost: Cost
    device: Device
    fits: Mapping[str, bool]  # by offload
    seconds: Mapping[str, float] | None  # by phase

    def as_json(self) -> dict[str, Any]:
        """Numbers by name."""
        told = {"fits": dict(self.fits), "seconds": self.seconds and dict(self.seconds)}
        return self.cost.as_json() | {"device": asdict(self.device)} | told

    def check(self, model: str) -> None:
        """Raise CapacityError where it cannot fit: nothing here is offloaded."""
        if self.fits["none"]:
            return
        needed, there = self.cost.resident(), self.device.total
        raise CapacityError(
            f"{model} at this size takes {gib(needed)} at once, and {self.device.name} has "
            f"{gib(there)}.",
            hint="a smaller --size, fewer --num-frames or another --model; --force tries it",
        )


def estimate(cost: Cost, machine: Machine, device: Device) -> Estimate:
    """Hold a cost against a device."""
    fits = {offload: cost.resident(offload) <= device.total for offload in OFFLOADS}
    dtype = "float32" if is_wide(machine, device.kind) else _narrow(machine)
    rates = read_rates(device)
    return Estimate(cost, device, fits, seconds(cost, rates, dtype) if rates else None)


def here(machine: Machine) -> tuple[Device, bool]:
    """The device that settings come to, and whether it will compute in float32."""
    device = find_device(machine)
    return device, is_wide(machine, device.kind)


def seconds(cost: Cost, rates: Rates, dtype: str) -> dict[str, float] | None:
    """By phase; None where that dtype was not measured. The VAE computes in float32."""
    if dtype not in rates.matmul or dtype not in rates.attention:
        return None
    spent = {}
    for phase, work in cost.work.items():
        kind = "float32" if phase == "decode" else dtype
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
        known = json.loads((user_cache() / RATES_FILE).read_bytes())
        return Rates(**known[device.key])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_rates(device: Device, rates: Rates) -> None:
    """Keep what was measured, beside that of other devices. Raises OutputError."""
    path = user_cache() / RATES_FILE
    try:
        known = json.loads(path.read_bytes())
    except (OSError, ValueError):
        known = {}
    kept = known if isinstance(known, dict) else {}
    text = json.dumps({**kept, device.key: asdict(rates)}, indent=2) + "\n"
    write_whole(path, text.encode(), hint="set WANCLI_CACHE_DIR to a folder that can be written")


def gib(size: float) -> str:
    """Bytes for people."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size / 2**10:,.1f} KiB"


def flops(count: float) -> str:
    """FLOPs for people."""
    for unit, scale in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count / 1e6:,.2f} MFLOP"


def duration(spent: float) -> str:
    """Seconds for people."""
    if spent < 120:
        return f"{spent:.1f} s"
    minutes, left = divmod(round(spent), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {left:02} s"


def _narrow(machine: Machine) -> str:
    return "bfloat16" if machine.dtype == "auto" else machine.dtype
