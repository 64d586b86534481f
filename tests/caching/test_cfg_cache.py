"""The CFG gate skips uncond forwards exactly by its formula, and restores the pipeline."""

from contextlib import ExitStack
from typing import Any

import pytest
import torch

from tests.caching import tiny
from wancli.caching.cfg_cache import cfg_gate
from wancli.caching.step_cache import step_cache
from wancli.config.settings import StepCache

GATE = 5
SCALE = 5.0
STEP_CACHE = tiny.DBCACHE


def generate(pipeline, first):
    with cfg_gate(pipeline, first) as gate:
        return tiny.generate(pipeline), gate


@torch.no_grad()
def apply_formula(pipeline, first, *, switch=tiny.STEPS):
    """The formula: cond + (scale - 1) * delta, as uncond + scale * (cond - uncond)."""
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(tiny.STEPS)
    latents, delta = tiny.draw(1, 4, 2, 8, 8), None
    for step, timestep in enumerate(scheduler.timesteps):
        expert = pipeline.transformer if step < switch else pipeline.transformer_2
        delta = None if step == switch else delta

        def forward(branch, expert=expert, latents=latents, timestep=timestep):
            text = tiny.inputs_of(expert, branch)
            return expert(latents, timestep.expand(1), **text, return_dict=False)[0]

        cond = forward("cond")
        uncond = forward("uncond") if step < first or delta is None else cond - delta
        if step < first or delta is None:
            delta = cond - uncond
        velocity = uncond + SCALE * (cond - uncond)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


def switch_of(pipeline):
    pipeline.scheduler.set_timesteps(tiny.STEPS)
    return int((pipeline.scheduler.timesteps >= 500).sum())


@pytest.mark.parametrize("experts", [1, 2])
def test_a_gate_that_is_never_reached_changes_nothing(experts):
    pipeline = tiny.pipeline(experts=experts)
    plain = tiny.generate(pipeline)
    latents, gate = generate(pipeline, tiny.STEPS)
    assert torch.equal(latents, plain)
    assert gate.skipped == []


@pytest.mark.parametrize("first", [0, GATE, tiny.STEPS - 1])
def test_it_equals_the_formula_and_skips_the_other_forwards(first):
    pipeline, blocks = tiny.pipeline(), tiny.Blocks()
    with blocks.counted(pipeline.transformer):
        latents, gate = generate(pipeline, first)
    assert torch.equal(latents, apply_formula(pipeline, first))
    computed = max(first, 1)  # the first step has no delta to reuse
    assert len(blocks.of_forwards) == tiny.STEPS + computed
    assert gate.skipped == list(range(computed, tiny.STEPS))
    assert not torch.equal(latents, tiny.generate(pipeline))


@pytest.mark.parametrize("first", [2, 7])
def test_the_delta_is_never_reused_across_the_switch_of_experts(first):
    pipeline, blocks = tiny.pipeline(experts=2), tiny.Blocks()
    switch = switch_of(pipeline)
    assert switch > 2
    with blocks.counted(pipeline.transformer_2):
        latents, _ = generate(pipeline, first)
    assert torch.equal(latents, apply_formula(pipeline, first, switch=switch))
    late = tiny.STEPS - switch
    assert len(blocks.of_forwards) == late + max(1, first - switch)


def test_a_pipeline_without_guidance_is_untouched():
    pipeline = tiny.pipeline()
    plain = tiny.generate(pipeline, guidance_scale=1.0)
    with cfg_gate(pipeline, 1) as gate:
        assert torch.equal(tiny.generate(pipeline, guidance_scale=1.0), plain)
    assert gate.skipped == []


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("outer", ["gate", "cache"])
def test_the_step_cache_is_notified_of_skipped_forwards(outer, experts):
    pipeline = tiny.pipeline(experts=experts)
    switch = switch_of(pipeline) if experts == 2 else tiny.STEPS
    parts = [(pipeline.transformer, 0, switch), (pipeline.transformer_2, switch, tiny.STEPS)]

    def both(settings):
        sessions: list[Any] = []
        with ExitStack() as stack:
            if outer == "gate":
                stack.enter_context(cfg_gate(pipeline, GATE, sessions))
            for transformer, start, end in parts[:experts]:
                cache = step_cache(
                    transformer, settings, steps=end - start, guided=True, first_step=start
                )
                sessions.append(stack.enter_context(cache))
            if outer == "cache":
                stack.enter_context(cfg_gate(pipeline, GATE, sessions))
            return tiny.generate(pipeline), [u for s in sessions for u in s.stats()]

    never = STEP_CACHE.model_copy(update={"cachedit_residual_threshold": 1e-9})
    exact, _ = both(never)
    assert torch.equal(exact, generate(pipeline, GATE)[0])

    latents, stats = both(STEP_CACHE)
    ungated = {*range(GATE)} | ({switch} if experts == 2 else set())
    assert [(use.step, use.branch) for use in stats] == [
        (step, branch)
        for step in range(tiny.STEPS)
        for branch in (("cond", "uncond") if step in ungated else ("cond",))
    ]
    assert any(use.reused and use.step > GATE for use in stats)
    assert not torch.equal(latents, exact)


@pytest.mark.parametrize("method", ["first-block", "seacache"])
def test_the_hooks_of_diffusers_work_under_the_gate(method):
    pipeline = tiny.pipeline()
    settings = StepCache(step_cache=method, step_cache_threshold=0.3)
    with (
        step_cache(pipeline.transformer, settings, steps=tiny.STEPS, guided=True) as session,
        cfg_gate(pipeline, GATE, [session]) as gate,
    ):
        tiny.generate(pipeline)
    assert [(use.step, use.branch) for use in session.stats()] == [
        (step, branch)
        for step in range(tiny.STEPS)
        for branch in (("cond",) if step in gate.skipped else ("cond", "uncond"))
    ]
    assert any(use.reused for use in session.stats() if use.step >= GATE)


@pytest.mark.parametrize("experts", [1, 2])
def test_the_pipeline_is_restored_even_after_an_error(experts):
    pipeline = tiny.pipeline(experts=experts)
    plain = tiny.generate(pipeline)
    before = dict(pipeline.config), pipeline.components, dict(vars(pipeline.transformer))
    generate(pipeline, GATE)
    with pytest.raises(ZeroDivisionError):
        fail(pipeline)
    assert (dict(pipeline.config), pipeline.components) == before[:2]
    assert vars(pipeline.transformer) == before[2]
    assert torch.equal(tiny.generate(pipeline), plain)


def fail(pipeline):
    with cfg_gate(pipeline, GATE):
        raise ZeroDivisionError


def test_the_gated_transformer_has_the_attributes_of_the_original():
    pipeline = tiny.pipeline()
    transformer = pipeline.transformer
    with cfg_gate(pipeline, GATE):
        gated = pipeline.transformer
        assert gated is not transformer
        assert (gated.config, gated.dtype) == (transformer.config, transformer.dtype)
        with pytest.raises(AttributeError, match="nonsense"):
            _ = gated.nonsense
        with pytest.raises(RuntimeError, match="after the cond"):
            gated(hidden_states=tiny.draw(1, 4, 2, 8, 8))


def test_an_offloaded_pipeline_stays_offloaded():
    pipeline = tiny.pipeline()
    plain, gated = tiny.generate(pipeline), generate(pipeline, GATE)[0]
    pipeline.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(generate(pipeline, GATE)[0], gated)
        assert torch.equal(tiny.generate(pipeline), plain)
    (hook,) = pipeline._all_hooks
    assert hook.model is pipeline.transformer
    assert hook.hook is pipeline.transformer._hf_hook
