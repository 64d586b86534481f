"""Milliseconds of device work by events, relative errors, and sums of kernels by class."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

BUDGET_S = 0.25  # of the repeats of one measurement
KINDS = {  # kernels by the first pattern that fits their name
    "fused": "triton",
    "attention": "flash|fmha|sdpa|attention|attn",
    "convolution": "conv|implicit|fprop|wgrad|cudnn.*ndhwc|nhwc",
    "product": "gemm|cutlass|cublas|nvjet|sm90_xmma|matmul|splitk",
    "copy": "memcpy|memset|copy|cat",
    "norm": "norm|softmax|reduce",
}


def wait(device: torch.device) -> None:
    """Wait until a device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def cudnn(*, benchmark: bool = False, tf32: bool = False) -> Iterator[None]:
    """Whether cuDNN times its kernels and rounds float32 to TF32, in the block."""
    backend = torch.backends.cudnn
    before = backend.benchmark, backend.allow_tf32
    backend.benchmark, backend.allow_tf32 = benchmark, tf32
    try:
        yield
    finally:
        backend.benchmark, backend.allow_tf32 = before


class Marks:
    """Marks in the time of a device's stream; on a CPU, of the clock."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._marks = device, list[Any]()
        self.mark()

    def mark(self) -> None:
        """End an interval. Does not wait."""
        if self._device.type != "cuda":
            self._marks.append(perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append(event)

    def ms(self) -> list[float]:
        """Milliseconds of each interval."""
        wait(self._device)
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._device.type == "cuda":
            return [a.elapsed_time(b) for a, b in pairs]
        return [1000 * (b - a) for a, b in pairs]


@torch.no_grad()
def time_ms(
    call: Callable[[], object], device: torch.device, *, budget_s: float = BUDGET_S, least: int = 5
) -> dict[str, Any]:
    """The first call, and the median and quartiles of repeats, in milliseconds."""
    wait(device)
    started = perf_counter()
    call()
    wait(device)
    first = 1000 * (perf_counter() - started)
    started = perf_counter()
    call()
    wait(device)
    once = perf_counter() - started
    marks = Marks(device)
    repeats = min(100, max(least, round(budget_s / max(once, 1e-6))))
    for _ in range(repeats if device.type == "cuda" else 1):  # a CPU only shows that it works
        call()
        marks.mark()
    return {"first_ms": round(first, 3), **spread(marks.ms())}


def spread(ms: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles."""
    ordered = sorted(ms)
    quarter = len(ordered) // 4
    return {
        "ms": round(median(ordered), 4),
        "quartiles_ms": [round(ordered[quarter], 4), round(ordered[-1 - quarter], 4)],
        "repeats": len(ordered),
    }


def relative(out: Tensor, reference: Tensor) -> float:
    """Norm of the difference relative to the reference's, in float64."""
    exact = reference.double()
    return float(f"{((out.double() - exact).norm() / exact.norm()).item():.3g}")


def kernel_ms(call: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Milliseconds of one call by kind of kernel, their number, and the slowest kernels."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    kind = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with torch.no_grad(), profile(activities=[kind]) as profiler:
        call()
        wait(device)
    sums, counts, slowest = defaultdict[str, float](float), 0, []
    for event in profiler.key_averages():
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        if not us:
            continue
        sums[_kind(event.key)] += us / 1000
        counts += event.count
        slowest.append((us / 1000, event.count, event.key))
    top = [[round(ms, 3), count, name[:90]] for ms, count, name in sorted(slowest)[:-13:-1]]
    return {
        "kernels_ms": {k: round(v, 3) for k, v in sums.items()},
        "kernels": counts,
        "slowest": top,
    }


def _kind(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, lower)), "other")
