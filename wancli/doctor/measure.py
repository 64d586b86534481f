"""How fast this machine multiplies, attends, convolves and copies: some seconds of each."""

from collections.abc import Callable
from datetime import UTC, datetime
from statistics import median
from time import perf_counter

import torch
from torch import Tensor
from torch.nn import functional

from wancli.estimate import Rates

ROUNDS = 3
DTYPES = ("float32", "bfloat16", "float16")


def measure(device: torch.device, *, budget_s: float = 0.3) -> Rates:
    """The rates of a device, each the median of three rounds of `budget_s` after a warmup."""
    large = device.type != "cpu"
    side, tokens = (8192, 16_384) if large else (1024, 1024)
    dtypes = DTYPES if large else DTYPES[:2]
    matmul, attention = {}, {}
    for name in dtypes:
        dtype = getattr(torch, name)
        left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        matmul[name] = 2 * side**3 * _per_second(device, budget_s, _product(left, right))
        query = torch.randn(1, 12, tokens, 128, device=device, dtype=dtype)
        work = 4 * 12 * tokens**2 * 128
        attention[name] = work * _per_second(device, budget_s, _attention(query))
    channels, size = 96, 240 if large else 48
    video = torch.randn(1, channels, 6, size, size, device=device)
    kernel = torch.randn(channels, channels, 3, 3, 3, device=device)
    cells = 4 * (size - 2) ** 2
    convolved = _per_second(device, budget_s, lambda: functional.conv3d(video, kernel))
    source = torch.empty((256 if large else 64) * 2**20, dtype=torch.uint8, device=device)
    copied = _per_second(device, budget_s, source.clone)
    return Rates(
        matmul=matmul,
        attention=attention,
        convolution=2 * 27 * channels**2 * cells * convolved,
        copy=2 * source.numel() * copied,
        measured=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _product(left: Tensor, right: Tensor) -> Callable[[], Tensor]:
    return lambda: left @ right


def _attention(query: Tensor) -> Callable[[], Tensor]:
    return lambda: functional.scaled_dot_product_attention(query, query, query)


@torch.no_grad()
def _per_second(device: torch.device, budget_s: float, call: Callable[[], Tensor]) -> float:
    call()
    _wait(device)
    since = perf_counter()
    call()
    _wait(device)
    calls = max(1, round(budget_s / max(perf_counter() - since, 1e-6)))
    rates = []
    for _ in range(ROUNDS):
        since = perf_counter()
        for _ in range(calls):
            call()
        _wait(device)
        rates.append(calls / (perf_counter() - since))
    return median(rates)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
