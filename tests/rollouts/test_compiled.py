"""Compiled rollouts: the number of graphs, and the same velocities as without compilation."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from tests.caching.tiny import draw, wan
from wancli.catalog.geometry import Span, Trim, WindowConfig
from wancli.config.settings import Machine, RopePolicy
from wancli.models.attention import choose_kernel
from wancli.models.optimize import compile_blocks, fuse_qkv
from wancli.rollouts.denoiser import CausalDenoiser, PromptPair, causal

SIZE, SIDE, PER_FRAME = 2, 8, 16
ROPE: tuple[RopePolicy, ...] = ("absolute", "relative", "sink")


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """No gradients, and no graphs of earlier tests."""
    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def window(frames: int, sink: int = 0, trim: Trim = "before") -> WindowConfig:
    return WindowConfig(frames, sink, SIZE, PER_FRAME, trim)


def spans(chunks: int) -> list[Span]:
    return [Span(index, SIZE * index, SIZE) for index in range(chunks)]


def prompts(model: CausalDenoiser, seed: int) -> PromptPair:
    cond, uncond = (draw(1, 7, 16, seed=each).to(model.device) for each in (seed, 2))
    return PromptPair(cond, uncond)


def roll(model: CausalDenoiser, *, chunks: int = 5) -> Tensor:
    """Velocities of chunks of two steps; the prompt changes once, with a recache."""
    out = []
    model.set_prompt(prompts(model, 1))
    for span in spans(chunks):
        if span.index == chunks - 2:
            model.set_prompt(prompts(model, 3))
            model.recache()
        out += chunk(model, span)
    return torch.cat(out).cpu()


def chunk(model: CausalDenoiser, span: Span) -> list[Tensor]:
    """Velocities of one chunk."""
    latents = draw(1, 4, span.frames, SIDE, SIDE, seed=span.index).to(model.device)
    model.begin(span)
    velocities = [model.velocity(latents, timestep) for timestep in (900.0, 500.0)]
    model.commit(latents, 0.0)
    return velocities


def warm(model: CausalDenoiser, *, chunks: int = 5) -> int:
    """Warm up; the number of graphs."""
    model.set_prompt(prompts(model, 1))
    model.warm_up(spans(chunks), torch.zeros(1, 4, SIZE, SIDE, SIDE, device=model.device))
    return graphs()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "count"),
    [
        (window(4), 2),
        pytest.param(window(6, 2), 2, marks=pytest.mark.slow),
        pytest.param(window(7, 3), 3, marks=pytest.mark.slow),  # one and a half chunks of sink
        pytest.param(window(5, trim="after"), 3, marks=pytest.mark.slow),
        pytest.param(window(20), 2, marks=pytest.mark.slow),
    ],
)
def test_blocks_branches_experts_prompts_and_positions_share_graphs(
    shape: WindowConfig, count: int
):
    models = [wan(seed=seed, num_layers=2) for seed in (0, 1)]
    options: dict[str, Any] = {"rope": "relative", "guidance_scale": 3.0, "boundary": 700.0}
    with causal(models, shape, **options) as denoiser:
        plain = roll(denoiser)
    for model in models:
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    velocities = []
    for _ in range(2):
        with causal(models, shape, **options) as denoiser:
            assert warm(denoiser) == count
            velocities.append(roll(denoiser))
    assert graphs() == count  # the warm-up had them all
    assert torch.equal(*velocities)
    assert relative(velocities[0], plain) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"recache_by": "window"}, {"recompute": True}], ids=str)
def test_caches_computed_anew_are_compiled_as_they_come(how: dict[str, Any]):
    model, shape = wan(num_layers=2), replace(window(6, 1), **how)
    with causal(model, shape, rope="relative") as denoiser:
        plain = roll(denoiser)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    with causal(model, shape, rope="relative") as denoiser:
        warm(denoiser)
        assert relative(roll(denoiser), plain) < 2e-6


def test_the_warm_up_leaves_nothing_behind():
    model = wan(num_layers=2)
    with causal(model, window(4, 1), rope="sink") as denoiser:
        plain = roll(denoiser)
    with causal(model, window(4, 1), rope="sink") as denoiser:
        warm(denoiser)
        assert torch.equal(roll(denoiser), plain)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize(
    ("rope", "shape"),
    [
        *((rope, window(6, 2)) for rope in ROPE),
        ("absolute", window(5)),
        ("absolute", window(5, trim="after")),
        ("relative", window(20)),
    ],
)
def test_a_compiled_rollout_differs_by_rounding(
    rope: RopePolicy, shape: WindowConfig, scale: float
):
    error = compiled_error(wan, shape, rope=rope, guidance_scale=scale)
    assert error < 2e-6, f"relative error {error:.1e}"


@pytest.mark.slow
def test_a_first_frame_that_is_a_chunk_by_itself_takes_a_graph_of_its_own():
    sizes = [Span(0, 0, 1), *(Span(index, SIZE * index - 1, SIZE) for index in range(1, 5))]
    latents = torch.zeros(1, 4, SIZE, SIDE, SIDE)
    velocities, model = [], wan(num_layers=2)
    for compiled in (False, True):
        if compiled:
            compile_blocks(model, "default")
        with causal(model, window(5)) as denoiser:
            denoiser.set_prompt(prompts(denoiser, 1))
            if compiled:
                denoiser.warm_up(sizes, latents)
                assert graphs() == 2
            velocities.append([chunk(denoiser, span) for span in sizes])
    assert graphs() == 2
    for plain, ours in zip(*velocities, strict=True):
        assert relative(torch.cat(ours), torch.cat(plain)) < 2e-6


@pytest.mark.slow
def test_fused_projections_are_compiled_in_rollouts():
    def fused() -> Any:
        model = wan()
        fuse_qkv(model)
        return model

    assert compiled_error(fused, window(5)) < 2e-6


def compiled_error(make: Callable[[], Any], shape: WindowConfig, **options: Any) -> float:
    """Relative difference of a compiled rollout from an eager one."""
    with causal(make(), shape, **options) as denoiser:
        plain = roll(denoiser)
    model = make()
    compile_blocks(model, "default")
    with causal(model, shape, **options) as denoiser:
        warm(denoiser)
        return relative(roll(denoiser), plain)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_a_compiled_block_copies_no_row_of_the_cache(backend: str):
    model, shape = wan(num_layers=1), window(40, 2)  # of more rows than any other tensor
    compile_blocks(model, "default")
    with causal(model, shape, rope="sink") as denoiser:
        attention = model.blocks[0].attn1.processor
        attention.backend = backend
        codes = run_and_get_code(warm, denoiser)[1]
        arena = attention.kv.keys.numel()
    assert len(codes) == 2
    sizes = [s for code in codes for s in re.findall(r"empty_strided_\w+\(\((.*?)\)", code)]
    assert sizes
    for size in sizes:
        assert "s" not in size, f"a tensor of every visible row: {size}"
        assert prod(map(int, size.strip(", ").split(", "))) < arena


# On a GPU: heads of a size that every kernel takes.
BIG: dict[str, Any] = {
    "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 64, "ffn_dim": 256,
}  # fmt: skip


@contextmanager
def on_cuda(
    dtype: torch.dtype, shape: WindowConfig, *, compiled: bool, **options: Any
) -> Iterator[CausalDenoiser]:
    """A denoiser with the kernels that torch tries first there; warm if it is compiled."""
    models = [wan(seed=seed, **BIG).to("cuda", dtype) for seed in (0, 1)]
    if compiled:
        for model in models:
            compile_blocks(model, "default")
    kernel = choose_kernel(models, Machine(), torch.device("cuda"), tokens=SIZE * PER_FRAME)
    defaults: dict[str, Any] = {"guidance_scale": 3.0, "boundary": 700.0, "kernel": kernel}
    with causal(models, shape, **(defaults | options)) as denoiser:
        if compiled:
            warm(denoiser)
        yield denoiser


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rope", "shape", "count"),
    [
        ("absolute", window(5), 2),
        ("relative", window(6, 2), 2),
        ("absolute", window(5, trim="after"), 3),
    ],
)
def test_a_compiled_rollout_is_as_exact_on_cuda(
    dtype: torch.dtype, rope: RopePolicy, shape: WindowConfig, count: int
):
    with on_cuda(torch.float32, shape, compiled=False, rope=rope) as denoiser:
        exact = roll(denoiser)
    with on_cuda(dtype, shape, compiled=False, rope=rope) as denoiser:
        eager = relative(roll(denoiser), exact)
    velocities = []
    for _ in range(2):
        with on_cuda(dtype, shape, compiled=True, rope=rope) as denoiser:
            velocities.append(roll(denoiser))
    error = relative(velocities[0], exact)
    assert error < max(1.25 * eager, 1e-5), f"compiled {error:.1e}, eager {eager:.1e}"
    assert graphs() == count
    assert torch.equal(*velocities)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_no_chunk_waits_for_cuda(compiled: bool):
    with on_cuda(torch.bfloat16, window(6, 2), compiled=compiled, rope="sink") as denoiser:
        roll(denoiser)
        inputs = [draw(1, 4, SIZE, SIDE, SIDE, seed=seed).cuda() for seed in range(3)]
        torch.cuda.set_sync_debug_mode("error")
        try:
            for span, latents in zip(spans(8)[5:], inputs, strict=True):
                denoiser.begin(span)
                for timestep in (900.0, 500.0):
                    denoiser.velocity(latents, timestep)
                denoiser.commit(latents, 0.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_compiled_blocks_copy_no_row_of_the_cache_on_cuda():
    shape, peaks = window(4000), []  # 62 MiB of keys and values a branch: far more than the rest
    for compiled in (False, True):
        with on_cuda(torch.bfloat16, shape, compiled=compiled, guidance_scale=1.0) as denoiser:
            denoiser.set_prompt(prompts(denoiser, 1))
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            for kv in (kv for expert in denoiser._experts for kv in expert.branches):
                kv.stored = 3000 * PER_FRAME  # nearly full
            chunk(denoiser, Span(9, 3000, SIZE))
            peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= peaks[0] + 2**20
