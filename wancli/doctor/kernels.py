"""Times and errors of attention kernels at the sizes of the known models."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from statistics import median
from time import perf_counter
from typing import Any, TypeVar

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    attention_backend,
    dispatch_attention_fn,
)
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from wancli.caching.attention import TORCH_KERNELS, attend, is_torch_kernel
from wancli.caching.lru import KV
from wancli.catalog.hub_cache import cache_folder
from wancli.cost.kernels import (
    WORST_ERROR,
    AttentionCase,
    KernelTime,
    rank_kernels,
    tokens_to_align,
    wrong_kernels,
)
from wancli.errors import CapacityError, first_line
from wancli.models.memory import fits_in_memory

# Queries [B, L, H, D], keys and values [B, M, H, D] to [B, L, H, D].
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

HEAD_SIZE = 128  # of every known Wan
TEXT, IMAGE = 512, 257  # tokens
CHUNK, CLIP = 4_680, 32_760  # 3 and 21 latent frames at 832x480
WINDOWS = (CHUNK, 4 * CHUNK, CLIP)  # that a chunk attends to
# Heads of 1.3B and 14B; each attends to itself, then to the prompt.
CASES = tuple(
    AttentionCase(heads, queries, keys)
    for heads in (12, 40)
    for queries, lengths in ((CHUNK, WINDOWS), (CLIP, (CLIP,)))
    for keys in (*lengths, TEXT)
)
ALIGNED_CASE = AttentionCase(40, CLIP, TEXT)
SMALL_CASES = (AttentionCase(12, 128, 128), AttentionCase(12, 128, TEXT))
ALIGNMENTS = (1, 8, 64, 128, 256)
# Kernels that keep all scores, and how many bytes of them are tried.
QUADRATIC, MOST_SCORES = ("_native_math", "flex"), 2**31
# The same kernels with more to do, or for other hardware.
LEFT_OUT = ("varlen", "npu", "xla", "flex")
ROUNDS, CHECKED_ROWS = 5, 64


@dataclass(frozen=True)
class MeasuredBackend:
    """A function that attends, in a context that is entered once."""

    attend: Attend
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class KernelTable:
    """Measured kernels, rounds by alignment of cross-attention, and what failed, with its error."""

    times: Sequence[KernelTime]
    aligned: Mapping[int, Sequence[float]]
    failed: Mapping[str, str] = field(default_factory=dict)


def measure_kernels(
    device: torch.device,
    backends: Mapping[str, MeasuredBackend] | None = None,
    *,
    round_s: float = 0.02,
    budget_s: float = 15.0,
) -> KernelTable:
    """Time every backend in every case, and compare its output with float32.

    A backend that raises is left out and named. No case is begun after `budget_s`.
    """
    large = device.type == "cuda"
    dtype = torch.bfloat16 if large else torch.float32
    backends = dict(available_backends(device) if backends is None else backends)
    times: list[KernelTime] = []
    failed: dict[str, str] = {}
    began = perf_counter()
    for case in CASES if large else SMALL_CASES:
        if perf_counter() - began > budget_s:
            break
        try:
            with fits_in_memory("attention"):
                tensors = _draw(case, device, dtype)
                expected = _reference(*tensors)
        except CapacityError:
            break
        for name, backend in list(backends.items()):
            if name in QUADRATIC and 4 * case.heads * case.queries * case.keys > MOST_SCORES:
                continue
            try:
                with torch.no_grad(), backend.context():
                    error = _error(backend.attend(*tensors), expected)
                    rounds = _rounds({name: partial(backend.attend, *tensors)}, device, round_s)
                times.append(KernelTime(name, case, median(rounds[name]), error))
            except Exception as problem:  # noqa: BLE001 - each kernel raises something else
                failed[name] = first_line(problem)
                del backends[name]
    times = [time for time in times if time.backend not in failed]
    aligned = measure_alignments(times, ALIGNED_CASE, device, round_s=round_s) if large else {}
    return KernelTable(times, aligned, failed)


def describe(table: KernelTable) -> Iterator[str]:
    """Lines about a table: what is fastest, wrong and broken, and whether to pad."""
    for heads, tokens in dict.fromkeys((t.case.heads, t.case.queries) for t in table.times):
        each = ", ".join(
            f"{name} {1000 * seconds:.3g} ms"
            for name, seconds in rank_kernels(table.times, heads=heads, tokens=tokens).items()
        )
        yield f"attention, {heads} heads, {tokens:,} tokens: {each}"
    for name, error in wrong_kernels(table.times).items():
        yield (
            f"attention, {name}: {100 * error:.2g} % off float32, so `attention_backend auto` "
            "never takes it"
        )
    for name, problem in table.failed.items():
        yield f"attention, {name}: {problem}"
    if table.aligned:
        each = ", ".join(f"{n}: {1000 * median(t):.3g} ms" for n, t in table.aligned.items())
        chosen = tokens_to_align("auto", table.aligned)
        padding = str(chosen) if chosen > 1 else "off"
        yield f"prompt K/V, padded to {each}; so `kv_align auto` is {padding}"


def available_backends(device: torch.device) -> Iterator[tuple[str, MeasuredBackend]]:
    """torch's kernels and diffusers' backends that attend to a tiny tensor here."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tiny = _draw(AttentionCase(2, 256, 256), device, dtype)
    for name in AttentionBackendName:
        if any(word in name.value for word in LEFT_OUT) or not _is_here(name):
            continue
        if name.value == "native" and device.type == "cuda":  # one of torch's kernels
            continue
        backend = find_backend(name.value, device)
        try:
            with torch.no_grad(), backend.context():
                backend.attend(*tiny)
        except Exception:  # noqa: BLE001 - the doctor lists what does not run
            continue
        yield name.value, backend


def find_backend(name: str, device: torch.device) -> MeasuredBackend:
    """A backend alone: torch's kernels as `AttentionKernel` runs them, others by diffusers."""
    if name in TORCH_KERNELS and is_torch_kernel(name, device):
        return MeasuredBackend(attend, partial(sdpa_kernel, TORCH_KERNELS[name]))
    # Checks its package, and loads its kernel.
    return MeasuredBackend(dispatch_attention_fn, partial(attention_backend, name))


def _is_here(name: AttentionBackendName) -> bool:
    """Whether nothing has to be downloaded: kernels of the hub are tried if they are cached."""
    from diffusers.models.attention_dispatch import _HUB_KERNELS_REGISTRY

    kernel: Any = _HUB_KERNELS_REGISTRY.get(name)
    return kernel is None or any(cache_folder().glob(f"*--{kernel.repo_id.replace('/', '--')}"))


def _draw(
    case: AttentionCase, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values, of which some keys matter much more than others."""
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(1, tokens, case.heads, HEAD_SIZE, generator=generator, device=device)
        for tokens in (case.queries, case.keys, case.keys)
    )
    return (2 * query).to(dtype), key.to(dtype), value.to(dtype)


def _rows(tokens: int, device: torch.device) -> Tensor:
    """Numbers of the queries that are checked, the first and the last among them."""
    return torch.linspace(0, tokens - 1, CHECKED_ROWS, device=device).long()


@torch.no_grad()
def _reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention in float32, by definition, of the checked queries: [B, H, rows, D]."""
    rows = _rows(query.shape[1], query.device)
    q, k, v = (x.float().transpose(1, 2) for x in (query[:, rows], key, value))
    return torch.softmax(q @ k.transpose(2, 3) / HEAD_SIZE**0.5, dim=-1) @ v


def _error(output: Tensor, expected: Tensor) -> float:
    """Relative error of an output [B, L, H, D]; 1 if any of it is not finite."""
    rows = _rows(output.shape[1], output.device)
    checked = output[:, rows].float().transpose(1, 2)
    error = float((checked - expected).norm() / expected.norm())
    return min(error, 1.0) if isfinite(error) and bool(output.isfinite().all()) else 1.0


Key = TypeVar("Key")


@torch.no_grad()
def _rounds(
    calls: Mapping[Key, Callable[[], object]], device: torch.device, round_s: float
) -> dict[Key, list[float]]:
    """Seconds of each call, in `ROUNDS` rounds in which they take turns."""

    def spent(call: Callable[[], object], times: int) -> float:
        since = perf_counter()
        for _ in range(times):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (perf_counter() - since) / times

    for call in calls.values():
        spent(call, 1)
    times = {key: max(1, round(round_s / spent(call, 1))) for key, call in calls.items()}
    rounds: dict[Key, list[float]] = {key: [] for key in calls}
    for _ in range(ROUNDS):
        for key, call in calls.items():
            rounds[key].append(spent(call, times[key]))
    return rounds


def measure_alignments(
    times: Sequence[KernelTime], case: AttentionCase, device: torch.device, *, round_s: float
) -> dict[int, list[float]]:
    """Rounds of image-to-video's cross-attention, by the multiple to which its keys are padded.

    By the fastest of torch's kernels in `times` that takes a mask. Paddings that change the output,
    or that do not run, are left out.
    """
    ranked = rank_kernels(times, heads=case.heads, tokens=case.queries)
    first = next((name for name in ranked if name in TORCH_KERNELS), "_native_cudnn")
    order = [TORCH_KERNELS[name] for name in (first, *(n for n in TORCH_KERNELS if n != first))]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with (
        suppress(CapacityError), fits_in_memory("attention"),
        sdpa_kernel(order, set_priority=True), torch.no_grad(),
    ):  # fmt: skip
        calls = _aligned_calls(*_draw(case, device, dtype))
        unpadded = calls[1]().float()
        right = {n: call for n, call in calls.items() if _is_close(call, unpadded)}
        return _rounds(right, device, round_s)
    return {}


def _aligned_calls(query: Tensor, key: Tensor, value: Tensor) -> dict[int, Callable[[], Tensor]]:
    """Attention over the text and the image, by the multiple to which the image is padded."""
    calls: dict[int, Callable[[], Tensor]] = {}
    for multiple in ALIGNMENTS:
        text, image = KV(), KV()
        text.fill(key, value, align=multiple)
        image.fill(key[:, :IMAGE], value[:, :IMAGE], align=multiple)

        def call(text: KV = text, image: KV = image) -> Tensor:
            return _over(query, text) + _over(query, image)

        calls[multiple] = call
    return calls


def _is_close(call: Callable[[], Tensor], expected: Tensor) -> bool:
    """Whether a call runs, and rounds as kernels do."""
    with suppress(RuntimeError):
        return float((call().float() - expected).norm() / expected.norm()) <= WORST_ERROR
    return False


def _over(query: Tensor, kv: Any) -> Tensor:
    return attend(query, kv.key, kv.value, mask=kv.mask)
