"""Cases 0 to 3 and 8: the card, attention, matrix products and the VAE's convolutions."""

import platform
import subprocess
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.session import Facts, Item, Session
from benchmarks.gpu.timing import cudnn, relative, time_ms
from wancli.utils.packages import package_version

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
FP8_MAX = 448.0  # of e4m3


def card(session: Session) -> Iterator[Item]:
    """Case 0: card, versions, and the two ceilings: a product and a copy."""
    device = session.device
    yield "versions", lambda: versions(session)
    side = 256 if session.small else 8192
    dtype = torch.float32 if session.small else torch.bfloat16

    def matmul() -> Facts:
        left, right = (draw(session, side, side, dtype=dtype) for _ in range(2))
        times = time_ms(lambda: left @ right, device)
        return times | {"tflops": rate(2 * side**3, times)}

    def copy() -> Facts:
        source = torch.empty((2**20 if session.small else 2**32), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        times = time_ms(lambda: target.copy_(source), device)
        return times | {"gb_s": round(2 * source.numel() / times["ms"] / 1e6, 1)}

    yield f"product {side}^3", matmul
    yield "copy", copy


def versions(session: Session) -> Facts:
    """The card, its driver, and the versions that times depend on."""
    facts: dict[str, Any] = {
        "wancli": session.commit or _output("git", "rev-parse", "--short", "HEAD"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": package_version("diffusers"),
        "triton": package_version("triton"),
        "torchao": package_version("torchao"),
        "card": platform.processor() or platform.machine(),
    }
    if session.device.type == "cuda":
        of = torch.cuda.get_device_properties(session.device)
        facts |= {
            "card": of.name,
            "memory_gib": round(of.total_memory / 2**30, 1),
            "multiprocessors": of.multi_processor_count,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
    return facts


def attention(session: Session) -> Iterator[Item]:
    """Case 1: SDPA of a chunk over each window, by backend and by layout of the cache."""
    chunk, windows = (16, (32,)) if session.small else (4680, (14_040, 32_760, 4680, 18_720))
    names = ("math",) if session.device.type == "cpu" else ("cudnn", "flash", "efficient")
    for heads, visible in product((12, 40), windows):
        if heads == 40 and visible not in windows[:2]:
            continue
        for layout in ("rows first", "heads first"):
            for name in ("choice", *names):
                title = f"{name}, {heads} heads, {visible} keys, {layout}"
                yield title, _attend(session, name, heads, chunk, visible, layout)


def _attend(
    session: Session, name: str, heads: int, chunk: int, visible: int, layout: str
) -> Callable[[], Facts]:
    dtype = torch.float32 if session.small else torch.bfloat16

    def heads_first(tokens: int) -> Tensor:  # [1, H, tokens, D]
        if layout == "heads first":
            return draw(session, 1, heads, tokens, 128, dtype=dtype)
        return draw(session, 1, tokens, heads, 128, dtype=dtype).transpose(1, 2)

    def run() -> Facts:
        query, key, value = heads_first(chunk), heads_first(visible), heads_first(visible)
        call = functional.scaled_dot_product_attention
        some = query[:, :, :256].float()  # the error of some queries says it for all
        exact = call(some, key.float(), value.float())
        if name == "choice":
            out = call(query, key, value)
            times = time_ms(lambda: call(query, key, value), session.device)
            chosen = SDPBackend(torch._fused_sdp_choice(query, key, value))
            times["choice"] = chosen.name
        else:
            with sdpa_kernel([BACKENDS[name]]):
                out = call(query, key, value)
                times = time_ms(lambda: call(query, key, value), session.device)
        flops = 4 * heads * chunk * visible * 128
        return times | {"tflops": rate(flops, times), "error": relative(out[:, :, :256], exact)}

    return run


def products(session: Session) -> Iterator[Item]:
    """Cases 2 and 8: the linear layers of a block, in bfloat16 and in fp8 by row."""
    rows = 16 if session.small else 4680
    sizes = {
        "to_q": (1536, 1536), "to_qkv": (1536, 4608), "ffn up": (1536, 8960),
        "ffn down": (8960, 1536), "14B to_q": (5120, 5120), "14B ffn up": (5120, 13_824),
    }  # fmt: skip
    if session.small:
        sizes = {"to_q": (32, 32), "ffn up": (32, 64)}
    for name, (inner, outer) in sizes.items():
        yield f"{name} bf16", _linear(session, rows, inner, outer, _plain)
        if name.endswith("ffn up"):
            yield f"{name} bf16 then gelu", _linear(session, rows, inner, outer, _then_gelu)
            yield f"{name} bf16 with gelu", _linear(session, rows, inner, outer, _with_gelu)
        if session.device.type == "cuda":
            yield f"{name} fp8 alone", _fp8(session, rows, inner, outer, quantizes=False)
            yield f"{name} fp8 with quantization", _fp8(session, rows, inner, outer, quantizes=True)


def _plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.linear(x, weight, bias)


def _then_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.gelu(functional.linear(x, weight, bias), approximate="tanh")


def _with_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)


def _linear(
    session: Session, rows: int, inner: int, outer: int, layer: Callable[..., Tensor]
) -> Callable[[], Facts]:
    def run() -> Facts:
        x, weight, bias = _layer(session, rows, inner, outer)
        exact = (_plain if layer is _plain else _then_gelu)(x.float(), weight.float(), bias.float())
        times = time_ms(lambda: layer(x, weight, bias), session.device)
        error = relative(layer(x, weight, bias), exact)
        return times | {"tflops": rate(2 * rows * inner * outer, times), "error": error}

    return run


def _fp8(
    session: Session, rows: int, inner: int, outer: int, *, quantizes: bool
) -> Callable[[], Facts]:
    def run() -> Facts:
        x, weight, bias = _layer(session, rows, inner, outer)
        exact = functional.linear(x.float(), weight.float(), bias.float())
        narrow, scale = _by_row(weight)
        by_row = torch.compile(_by_row) if quantizes else _by_row
        ready = by_row(x)

        def call() -> Tensor:
            left, left_scale = by_row(x) if quantizes else ready
            return torch._scaled_mm(
                left, narrow.t(), scale_a=left_scale, scale_b=scale.t(), bias=bias,
                out_dtype=torch.bfloat16, use_fast_accum=True,
            )  # fmt: skip

        times = time_ms(call, session.device)
        error = relative(call(), exact)
        return times | {"tflops": rate(2 * rows * inner * outer, times), "error": error}

    return run


def _by_row(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 [rows, inner] and its scales [rows, 1]."""
    scale = x.abs().amax(1, keepdim=True).float() / FP8_MAX
    return (x / scale).to(torch.float8_e4m3fn), scale


def _layer(session: Session, rows: int, inner: int, outer: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float32 if session.small else torch.bfloat16
    weight = draw(session, outer, inner, dtype=dtype) * inner**-0.5
    return draw(session, rows, inner, dtype=dtype), weight, draw(session, outer, dtype=dtype)


Shape = tuple[int, int, tuple[int, int, int], int, int, int]
CONVOLUTIONS: tuple[Shape, ...] = (  # of a latent: in, out, kernel, T, H, W
    (384, 384, (3, 3, 3), 1, 60, 104),
    (192, 384, (3, 3, 3), 2, 120, 208),
    (384, 384, (3, 3, 3), 2, 120, 208),
    (192, 192, (3, 3, 3), 4, 240, 416),
    (96, 96, (3, 3, 3), 4, 480, 832),
    (96, 3, (3, 3, 3), 4, 480, 832),
    (384, 768, (3, 1, 1), 1, 60, 104),
)


def convolutions(session: Session) -> Iterator[Item]:
    """Case 3: the VAE's convolutions by layout, padding, dtype and latents a call."""
    shapes = CONVOLUTIONS
    if session.small:
        shapes = tuple((i // 48, max(1, o // 48), k, t, 8, 8) for i, o, k, t, _, _ in shapes[:2])
    half = torch.float32 if session.small else torch.bfloat16
    variants = (
        (half, "NDHWC", "own padding", 3),
        (half, "NCDHW", "own padding", 3),
        (half, "NCDHW", "F.pad", 1),
        (half, "NDHWC", "own padding", 1),
        (half, "NDHWC", "F.pad", 1),
        (torch.float32, "NCDHW", "F.pad", 1),
    )
    for (dtype, layout, padding, latents), shape in product(variants, shapes):
        inner, outer, kernel, frames, height, width = shape
        name = f"{inner}-{outer} {'x'.join(map(str, kernel))} at {frames}x{height}x{width}"
        title = f"{name}, {str(dtype)[6:]}, {layout}, {padding}, {latents} latents"
        yield title, _convolve(session, shape, dtype, layout, padding, latents)


def _convolve(
    session: Session, shape: Shape, dtype: torch.dtype, layout: str, padding: str, latents: int
) -> Callable[[], Facts]:
    inner, outer, kernel, frames, height, width = shape
    frames *= latents
    order = torch.channels_last_3d if layout == "NDHWC" else torch.contiguous_format
    side = kernel[1] // 2

    def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if padding == "F.pad":
            return functional.conv3d(functional.pad(x, (side, side, side, side)), weight, bias)
        return functional.conv3d(x, weight, bias, padding=(0, side, side))

    def run() -> Facts:
        taps = inner * kernel[0] * kernel[1] * kernel[2]
        x = draw(session, 1, inner, frames + 2, height, width, dtype=dtype)
        weight = draw(session, outer, inner, *kernel, dtype=dtype) * taps**-0.5
        x, weight = x.contiguous(memory_format=order), weight.contiguous(memory_format=order)
        bias = draw(session, outer, dtype=dtype)
        with cudnn(benchmark=True):
            times = time_ms(lambda: convolve(x, weight, bias), session.device, budget_s=0.1)
            few = convolve(x, weight, bias)[:, :, :1]
        with cudnn():
            exact = convolve(x[:, :, :3].float(), weight.float(), bias.float())
        work = 2 * taps * outer * frames * height * width
        return times | {"tflops": rate(work, times), "error": relative(few, exact)}

    return run


def draw(session: Session, *size: int, dtype: torch.dtype) -> Tensor:
    """Random numbers on the device."""
    return torch.randn(size, device=session.device, dtype=dtype)


def rate(flops: float, times: Facts) -> float:
    """TFLOP/s."""
    return float(f"{flops / times['ms'] / 1e9:.4g}")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except OSError:
        return ""
    return done.stdout.strip()
