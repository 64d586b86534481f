"""Measure the throughput of this machine: matmuls, attention, convolutions and copies."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from statistics import median
from time import perf_counter

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import sdpa_kernel

from wancli.caching.attention import TORCH_KERNELS
from wancli.catalog.gpus import FP8_CAPABILITY
from wancli.config.precision import LATENTS_PER_CALL
from wancli.cost.estimate import FP8, Rates
from wancli.cost.wan_vae import CACHE_FRAMES, CAUSAL
from wancli.doctor.kernels import KernelTable
from wancli.models.fast_decoder import DecoderSpeedups, FastDecoder

ROUNDS = 3
DTYPES = ("float32", "bfloat16", "float16")
# Channels, frames and side of the inputs of a VAE's residual blocks, from its latents on. The last
# is over 32 MiB, for which a CPU allocates memory anew each time, as in a real video.
LAYERS = ((384, 1, 32), (192, 2, 48), (96, 4, 160))
SMALL_LAYERS = ((64, 1, 12), (64, 2, 24), (32, 4, 48))


def measure(
    device: torch.device, kernels: KernelTable | None = None, *, budget_s: float = 0.3
) -> Rates:
    """Measure a device's rates, each the median of three rounds of `budget_s` after a warmup.

    `kernels` are stored with them.
    """
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
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY:
        matmul[FP8] = 2 * side**3 * _per_second(device, budget_s, _fp8_product(side, device))
    layers = [(c, frames, side * (4 if large else 1)) for c, frames, side in LAYERS]
    source = torch.empty((256 if large else 64) * 2**20, dtype=torch.uint8, device=device)
    copied = _per_second(device, budget_s, source.clone)
    return Rates(
        matmul=matmul,
        attention=attention,
        convolution=_convolution_rate(device, budget_s, layers),
        small_convolution=_convolution_rate(device, budget_s, SMALL_LAYERS),
        fast_convolution=_fast_rate(device, budget_s, layers) if device.type == "cuda" else None,
        copy=2 * source.numel() * copied,
        measured=datetime.now(UTC).isoformat(timespec="seconds"),
        kernels=tuple(kernels.times) if kernels else (),
        aligned=kernels.aligned if kernels else {},
    )


class ResidualBlocks(nn.Module):
    """Residual blocks of a VAE, each on features of its own [1, C, T, H, W] after cached ones."""

    def __init__(self, layers: Sequence[tuple[int, int, int]]) -> None:
        """`layers` are channels, frames and side."""
        super().__init__()
        self.blocks = nn.ModuleList(WanResidualBlock(channels, channels) for channels, *_ in layers)
        self._layers, self._features = layers, list[tuple[Tensor, Tensor]]()

    def forward(self, like: Tensor) -> Tensor:
        """Run all blocks on features with the device, dtype and layout of `like`; returns it."""
        if not self._features:
            self._features = [
                (self._random(c, frames, side, like), self._random(c, CACHE_FRAMES, side, like))
                for c, frames, side in self._layers
            ]
        for block, (features, before) in zip(self.blocks, self._features, strict=True):
            block(features, feat_cache=[before, before], feat_idx=[0])
        return like

    @staticmethod
    def _random(channels: int, frames: int, side: int, like: Tensor) -> Tensor:
        last = like.is_contiguous(memory_format=torch.channels_last_3d)
        layout = torch.channels_last_3d if last else torch.contiguous_format
        features = torch.randn(1, channels, frames, side, side, device=like.device)
        return features.to(like.dtype, memory_format=layout)


def _convolution_rate(
    device: torch.device, budget_s: float, layers: Sequence[tuple[int, int, int]], *,
    fast: DecoderSpeedups | None = None,
) -> float:  # fmt: skip
    """FLOPs per second of a VAE's residual blocks, one after the other, as in decoding.

    The time includes their norms, activations and caching.
    """
    blocks: nn.Module = ResidualBlocks(layers)
    blocks = (FastDecoder(blocks, fast) if fast else blocks).to(device)
    like = torch.zeros(1, 2, 2, 2, 2, device=device)
    work = sum(2 * 2 * CAUSAL * c**2 * frames * side**2 for c, frames, side in layers)
    return work * _per_second(device, budget_s, lambda: blocks(like))


def _fast_rate(
    device: torch.device, budget_s: float, layers: Sequence[tuple[int, int, int]]
) -> float:
    """The same as the fast decoder runs them."""
    several = [(c, LATENTS_PER_CALL * frames, side) for c, frames, side in layers]
    speedups = DecoderSpeedups(dtype=torch.bfloat16, benchmark=False)
    return _convolution_rate(device, budget_s, several, fast=speedups)


def _product(left: Tensor, right: Tensor) -> Callable[[], Tensor]:
    return lambda: left @ right


def _fp8_product(side: int, device: torch.device) -> Callable[[], Tensor]:
    """A product with a scale for each row of the one and each column of the other."""
    left, right = (torch.randn(side, side, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    scales = torch.ones(side, 1, device=device)
    return lambda: torch._scaled_mm(
        left, right.t(), scales, scales.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _attention(query: Tensor) -> Callable[[], Tensor]:
    """Attention in the kernel that runs take where none was measured."""

    def call() -> Tensor:
        with sdpa_kernel([*TORCH_KERNELS.values()], set_priority=True):
            return functional.scaled_dot_product_attention(query, query, query)

    return call


@torch.no_grad()
def _per_second(device: torch.device, budget_s: float, call: Callable[[], object]) -> float:
    """Calls per second, the median of `ROUNDS` rounds of `budget_s`."""
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
    """Wait until a device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
