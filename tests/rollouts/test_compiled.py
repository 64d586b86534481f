"""Compiled rollouts: the number of graphs, and the same velocities as without compilation."""

import re
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from tests.caching.tiny import draw, wan
from wancli.catalog.geometry import Span, Trim, WindowConfig
from wancli.config.settings import RopePolicy
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


def prompts(seed: int) -> PromptPair:
    return PromptPair(draw(1, 7, 16, seed=seed), draw(1, 7, 16, seed=2))


def roll(model: CausalDenoiser, *, chunks: int = 5, device: str = "cpu") -> Tensor:
    """Velocities of chunks of two steps; the prompt changes once, with a recache."""
    out = []
    model.set_prompt(prompts(1))
    for span in spans(chunks):
        if span.index == chunks - 2:
            model.set_prompt(prompts(3))
            model.recache()
        model.begin(span)
        latents = draw(1, 4, SIZE, SIDE, SIDE, seed=span.index).to(device)
        out += [model.velocity(latents, timestep).cpu() for timestep in (900.0, 500.0)]
        model.commit(latents, 0.0)
    return torch.cat(out)


def warm(model: CausalDenoiser, *, chunks: int = 5) -> int:
    """Warm up; the number of graphs."""
    model.set_prompt(prompts(1))
    model.warm_up(spans(chunks), torch.zeros(1, 4, SIZE, SIDE, SIDE, device=model.device))
    return graphs()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


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
