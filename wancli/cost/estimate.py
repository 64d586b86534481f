"""Fit a cost to this machine: does it fit in memory, and how long does it take?"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from wancli.catalog.gpus import FP8_RATE, capability_of
from wancli.config.precision import decoder_dtype, decodes_fast, transformer_dtype
from wancli.config.settings import Machine
from wancli.cost.devices import Device, find_cpu, find_device
from wancli.cost.kernels import KernelTime
from wancli.cost.totals import Cost
from wancli.errors import CapacityError, PlanError
from wancli.planning.offload import OFFLOADS
from wancli.planning.rules_machine import check_capability, check_device_kind
from wancli.utils.disk import user_cache
from wancli.utils.files import write_whole
from wancli.utils.reading import read_json
from wancli.utils.units import gib

RATES_FILE = "rates.json"
FP8 = "float8_e4m3fn"  # torch's name
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Rates:
    """Measured throughput per second: FLOPs by dtype, and bytes copied."""

    matmul: Mapping[str, Rate]
    attention: Mapping[str, Rate]
    convolution: Rate  # of whole VAE blocks in float32
    small_convolution: Rate  # likewise
    copy: Rate
    fast_convolution: Rate | None = None  # of whole VAE blocks as the fast decoder runs them
    measured: str = ""  # when, ISO 8601
    kernels: tuple[KernelTime, ...] = ()  # of attention
    aligned: Mapping[int, Sequence[Rate]] = field(default_factory=dict)  # see tokens_to_align


@dataclass(frozen=True)
class Estimate:
    """A cost on a device. `seconds` is None if the device was never measured."""

    cost: Cost
    machine: Machine
    device: Device
    offload: str  # the mode used
    fits: Mapping[str, bool]  # by offload
    possible: Sequence[str]  # offloads compatible with the other settings
    ram: int  # bytes of RAM, which holds offloaded weights
    seconds: Mapping[str, float] | None  # by phase

    def as_json(self) -> dict[str, Any]:
        """The cost and how it fits, as one flat object."""
        device = {"device": asdict(self.device), "offload": self.offload}
        fit = {"fits": dict(self.fits), "seconds": self.seconds and dict(self.seconds)}
        return self.cost.as_json() | device | fit

    @property
    def sufficient(self) -> bool:
        """Whether memory suffices under the offload mode used."""
        return self.fits[self.offload]

    @property
    def needed(self) -> int:
        """Peak bytes on the device under that mode."""
        return self.cost.resident(self.offload)

    @property
    def total_s(self) -> float | None:
        """Seconds of all phases, if known."""
        return sum(self.seconds.values()) if self.seconds else None

    def check(self, model: str, remedy: str = "") -> None:
        """Raise CapacityError if it does not fit; `remedy` is flags under which it would."""
        if self.sufficient:
            return
        needed, total, where = self.needed, self.device.total, self.device.name
        if needed <= total:
            needed, total, where = (
                sum(self.cost.weights.values()),
                self.ram,
                "the RAM for offloaded weights",
            )
        how = "" if self.offload == "none" else f" under `offload {self.offload}`"
        raise CapacityError(
            f"{model} at this size needs {gib(needed)}{how}; {where} has {gib(total)}.",
            hint=f"{self._hint(remedy)}; `force` tries anyway",
        )

    def _hint(self, remedy: str) -> str:
        """Flags that would make it fit."""
        if other := next((offload for offload in self.possible if self.fits[offload]), None):
            return f"`offload {other}`"
        least = list(self.possible)[-1]
        weights = max(self.cost.resident_weights[least].values())  # whatever the video's size
        fewer = "fewer `num_frames` (rollout: a smaller `rolling_window`)"
        smaller = f"a smaller `size`, {fewer} or a smaller `model`"
        others = "a smaller `model`" if weights > self.device.total else smaller
        return f"{remedy}, or {others}" if remedy else others


def estimate(
    cost: Cost,
    machine: Machine,
    device: Device,
    offloads: Sequence[str] = tuple(OFFLOADS),
    *,
    ram: int | None = None,
) -> Estimate:
    """Check a cost against a device, choosing from `offloads`.

    `ram` is this machine's by default, and what the weights need beside a device that is only
    planned for. Only CUDA GPUs offload: other devices compute in RAM.
    """
    weights = sum(cost.weights.values())
    if ram is None:
        ram = find_cpu().total if device.here else weights
    in_ram = ram >= weights
    modes = list(OFFLOADS) if device.kind == "cuda" else ["none"]
    fits = {n: cost.resident(n) <= device.total and (n == "none" or in_ram) for n in modes}
    possible = [offload for offload in modes if offload in offloads]
    chosen: str = machine.offload
    if chosen == "auto":
        chosen = next((offload for offload in possible if fits[offload]), possible[-1])
    rates, dtype = read_rates(device), transformer_dtype(machine, device.kind)
    fp8 = machine.quantize == "fp8-dynamic"
    vae, fast = decoder_dtype(machine, device.kind), decodes_fast(machine, device.kind)
    spent = phase_seconds(cost, rates, dtype, vae=vae, fp8=fp8, fast=fast) if rates else None
    return Estimate(cost, machine, device, chosen, fits, possible, ram, spent)


def resolve_device(machine: Machine, gpu: Device | None = None) -> tuple[Device, bool]:
    """The device that the settings select, or `gpu`, and whether it computes in float32.

    Raises PlanError for settings that the device does not support.
    """
    if gpu and machine.device.partition(":")[0] not in ("auto", gpu.kind):
        raise PlanError(
            f"`gpu` plans for {gpu.name}, not for `device {machine.device}`.",
            hint="drop one of the two",
        )
    device = gpu or find_device(machine)
    check_device_kind(machine, device.kind)
    check_capability(machine, device.name, capability_of(device.name))
    return device, transformer_dtype(machine, device.kind) == "float32"


def phase_seconds(
    cost: Cost, rates: Rates, dtype: str, *, vae: str = "float32", fp8: bool = False,
    fast: bool = False,
) -> dict[str, float] | None:  # fmt: skip
    """Seconds by phase; None if that dtype was not measured.

    `fp8` is for the transformer's products, all of them: those that stay wide are few. Weight
    transfers are not counted, and convolutions are assumed to be as slow as in float32, unless the
    VAE decodes `fast` and that was measured.
    """
    if not {dtype, vae} <= rates.matmul.keys() & rates.attention.keys():
        return None
    spent = {}
    for phase, work in cost.work.items():
        kind = vae if phase == "decode" else dtype
        matmul = rates.matmul[kind]
        if fp8 and phase == "denoise":
            matmul = rates.matmul.get(FP8, FP8_RATE * matmul)
        quick = rates.fast_convolution if fast and phase == "decode" else None
        convolution = quick or rates.convolution
        spent[phase] = (
            work.matmul / matmul
            + work.attention / rates.attention[kind]
            + work.convolution / convolution
            + work.small_convolution / rates.small_convolution
            + cost.memory_traffic.get(phase, 0) / rates.copy
        )
    return spent


def read_rates(device: Device) -> Rates | None:
    """Rates that `wancli doctor --measure` saved for this device and torch, if any.

    For a device that is only planned for, under any torch.
    """
    try:
        devices = read_json(user_cache() / RATES_FILE)
        anywhere = [key for key in devices if str(key).startswith(f"{device.name}, torch ")]
        key = device.key if device.here else anywhere[-1]
        return TypeAdapter(Rates).validate_python(devices[key])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def rates_here(machine: Machine) -> Rates | None:
    """Rates of the device that the settings select.

    Without any file of rates it is not looked for, which may take a run of nvidia-smi.
    """
    if not (user_cache() / RATES_FILE).is_file():
        return None
    return read_rates(find_device(machine))


def stale_rates(device: Device) -> str:
    """Why a device has no rates: never measured, or not with this torch or as many threads."""
    try:
        keys = [str(key) for key in read_json(user_cache() / RATES_FILE)]
    except (OSError, ValueError, TypeError):
        keys = []
    others = [key for key in keys if key.startswith(f"{device.name}, ")]
    if not others or device.key in others:
        return "never measured"
    return f"measured only with {others[-1].removeprefix(f'{device.name}, ')}"


def write_rates(device: Device, rates: Rates) -> None:
    """Save the rates of a device beside those of others. Raises OutputError."""
    path = user_cache() / RATES_FILE
    try:
        devices = read_json(path)
    except (OSError, ValueError):
        devices = {}
    text = json.dumps({**devices, device.key: asdict(rates)}, indent=2) + "\n"
    hint = "set WANCLI_CACHE_DIR to a folder that can be written"
    write_whole(path, text.encode(), hint=hint, overwrite=True)
