"""cache-dit's step cache on tiny real models: exactness, stats and cleanup."""

import logging
import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from tests.caching import tiny
from wancli.caching.step_cache import step_cache
from wancli.config.settings import StepCache
from wancli.errors import PlanError
from wancli.planning.step_caches import step_cache_bytes, taylorseer_steps


def dbcache(**changes) -> StepCache:
    values = {
        "step_cache": "cachedit",
        "cachedit_fn": 2,
        "cachedit_max_warmup_steps": 3,
        "cachedit_residual_threshold": 0.15,
    }
    return StepCache(**(values | changes))


NEVER = dbcache(cachedit_residual_threshold=1e-9)
ALWAYS = dbcache(cachedit_residual_threshold=1.0, cachedit_max_continuous=0)
TAYLORSEER = dbcache(taylorseer=True, cachedit_max_warmup_steps=5)


def run(transformer, settings, *, steps=tiny.STEPS, guided=True):
    with step_cache(transformer, settings, steps=steps, guided=guided) as session:
        return tiny.denoise(transformer, steps=steps, guided=guided), session.stats()


def reused(stats, branch="cond"):
    return [use.step for use in stats if use.reused and use.branch == branch]


def fail_midway(transformer, settings):
    with step_cache(transformer, settings, steps=2, guided=True):
        tiny.denoise(transformer)


def split(pipeline):
    """Steps of each expert."""
    pipeline.scheduler.set_timesteps(tiny.STEPS)
    early = int((pipeline.scheduler.timesteps >= 500).sum())
    return early, tiny.STEPS - early


def cached_tensors(manager):
    """All tensors that cache-dit keeps."""
    tensors = []
    for context in manager._cached_context_manager.values():
        tensors += context.buffers.values()
        calibrators = (*context.get_calibrators(), *context.get_cfg_calibrators())
        for calibrator in filter(None, calibrators):
            for state in calibrator.states.values():
                tensors += state.state["dY_prev"] + state.state["dY_current"]
    return [tensor for tensor in tensors if tensor is not None]


# --- exact if nothing is reused ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "guided"),
    [
        (tiny.wan, False),
        (lambda: tiny.wan(**tiny.I2V), True),
        (tiny.vace, True),
        (tiny.hunyuan, True),
    ],
    ids=["t2v unguided", "i2v", "vace", "hunyuan"],
)
def test_a_threshold_that_is_never_met_changes_nothing(build, guided):
    transformer = build()
    plain = tiny.denoise(transformer, guided=guided)
    latents, stats = run(transformer, NEVER, guided=guided)
    assert torch.equal(latents, plain)
    assert len(stats) == tiny.STEPS * (2 if guided else 1)
    assert any(use.residual for use in stats)  # measured, and too large


@pytest.mark.parametrize("expand_timesteps", [False, True])
def test_a_threshold_that_is_never_met_changes_nothing_in_a_pipeline(expand_timesteps):
    pipeline = tiny.pipeline(expand_timesteps=expand_timesteps)
    plain = tiny.generate(pipeline)
    with step_cache(pipeline.transformer, NEVER, steps=tiny.STEPS, guided=True):
        assert torch.equal(tiny.generate(pipeline), plain)


def test_each_of_two_experts_has_its_own_steps():
    pipeline = tiny.pipeline(experts=2)
    plain = tiny.generate(pipeline)
    early, late = split(pipeline)
    for settings in (NEVER, ALWAYS):
        with (
            step_cache(pipeline.transformer, settings, steps=early, guided=True) as first,
            step_cache(
                pipeline.transformer_2, settings, steps=late, guided=True, first_step=early
            ) as second,
        ):
            latents = tiny.generate(pipeline)
        assert torch.equal(latents, plain) == (settings is NEVER)
        stats = first.stats() + second.stats()
        assert [use.step for use in stats] == [step for step in range(tiny.STEPS) for _ in "ab"]
    warm = ALWAYS.cachedit_max_warmup_steps
    assert reused(stats) == [*range(warm, early), *range(early + warm, tiny.STEPS)]


def test_a_transformer_that_is_done_frees_its_cache_for_the_other():
    transformer = tiny.wan()
    with step_cache(transformer, TAYLORSEER, steps=tiny.STEPS, guided=True):
        tiny.denoise(transformer, steps=tiny.STEPS - 1)
        assert cached_tensors(transformer._context_manager)
        tiny.denoise(transformer, steps=1)
        assert not cached_tensors(transformer._context_manager)


# --- pitfalls of step caches -------------------------------------------------------------------


def test_more_steps_than_announced_are_an_error():
    transformer = tiny.wan()
    with (
        step_cache(transformer, dbcache(), steps=tiny.STEPS - 1, guided=True),
        pytest.raises(RuntimeError, match="more forwards"),
    ):
        tiny.denoise(transformer)


def test_two_pipelines_of_one_process_are_independent():
    one, other = tiny.pipeline(), tiny.pipeline(experts=2)
    other.boundary_ratio = None
    plain = tiny.generate(one)
    with step_cache(one.transformer, ALWAYS, steps=tiny.STEPS, guided=True):
        alone = tiny.generate(one)
    with (
        step_cache(other.transformer_2, ALWAYS, steps=tiny.STEPS, guided=True),
        step_cache(one.transformer, ALWAYS, steps=tiny.STEPS, guided=True),
    ):
        assert torch.equal(tiny.generate(one), alone)
    with step_cache(other.transformer, ALWAYS, steps=tiny.STEPS, guided=True):
        assert torch.equal(tiny.generate(one), plain)


def test_settings_of_an_earlier_generation_do_not_persist():
    transformer = tiny.wan()
    plain, stats = run(transformer, ALWAYS)
    assert reused(stats)
    taylorseer = ALWAYS.model_copy(update={"taylorseer": True, "cachedit_max_warmup_steps": 5})
    extrapolated, _ = run(transformer, taylorseer)
    assert not torch.equal(extrapolated, plain)
    again, stats_again = run(transformer, ALWAYS)
    assert torch.equal(again, plain)
    assert stats_again == stats


def test_a_step_cache_cannot_be_nested():
    transformer = tiny.wan()
    with (
        step_cache(transformer, dbcache(), steps=tiny.STEPS, guided=True),
        pytest.raises(RuntimeError, match="one step cache at a time"),
        step_cache(transformer, dbcache(), steps=tiny.STEPS, guided=True),
    ):
        raise AssertionError("entered")


@pytest.mark.parametrize("order", [1, 2])
def test_taylorseer_reaches_its_order_after_enough_computed_steps(order):
    def last_step(*, warmup, order):
        taylorseer = {"taylorseer": True, "taylorseer_order": order} if order else {}
        settings = ALWAYS.model_copy(update={"cachedit_max_warmup_steps": warmup, **taylorseer})
        return run(tiny.wan(), settings, steps=warmup + 1)[0]

    enough = taylorseer_steps(order)
    early = last_step(warmup=enough - 1, order=order)
    assert torch.equal(early, last_step(warmup=enough - 1, order=order - 1))
    ready = last_step(warmup=enough, order=order)
    assert not torch.equal(ready, last_step(warmup=enough, order=order - 1))


def test_cond_and_uncond_reuse_the_same_steps():
    _, stats = run(tiny.wan(), dbcache(cachedit_residual_threshold=0.11))
    assert reused(stats) == reused(stats, "uncond")
    assert 0 < len(reused(stats)) < tiny.STEPS - 3
    by_step = [[use.residual for use in two] for _, two in groupby(stats, lambda use: use.step)]
    assert all(cond == uncond for cond, uncond in by_step)


def test_the_number_of_reused_steps_is_not_limited():
    latents, stats = run(tiny.wan(), ALWAYS, steps=20)
    assert reused(stats) == list(range(3, 20))
    assert torch.isfinite(latents).all()


@pytest.mark.parametrize("most", [1, 4])
def test_max_continuous_limits_steps_reused_in_a_row(most):
    _, stats = run(tiny.wan(), ALWAYS.model_copy(update={"cachedit_max_continuous": most}))
    cond = [use.reused for use in stats if use.branch == "cond"][3:]
    assert max(len(list(group)) for hit, group in groupby(cond) if hit) == most


def test_vace_may_have_a_last_block():
    transformer = tiny.vace()
    plain = tiny.denoise(transformer)
    one = NEVER.model_copy(update={"cachedit_bn": 1})
    assert torch.equal(run(transformer, one)[0], plain)


def test_an_unknown_transformer_is_rejected_and_a_subclass_inherits():
    class Special(WanTransformer3DModel):  # type: ignore[misc]
        pass

    transformer = tiny.build(Special, **tiny.WAN)
    assert reused(run(transformer, ALWAYS)[1])
    linear = torch.nn.Linear(1, 1)
    with (
        pytest.raises(PlanError, match="Linear has no step cache"),
        step_cache(linear, NEVER, steps=9, guided=True),
    ):
        raise AssertionError("entered")


@pytest.mark.parametrize("build", [tiny.wan, tiny.vace, tiny.hunyuan], ids=["wan", "vace", "hy"])
def test_the_transformer_is_restored(build):
    transformer, settings = build(), dbcache(cachedit_max_warmup_steps=4, taylorseer=True)
    before, keys = tiny.traces(transformer), list(transformer.state_dict())
    plain = tiny.denoise(transformer)
    run(transformer, settings)
    with pytest.raises(RuntimeError, match="more forwards"):
        fail_midway(transformer, settings)
    vars(transformer).pop("_diffusers_hook")  # left by cache_context of the plain loop
    assert tiny.traces(transformer) == before
    assert list(transformer.state_dict()) == keys
    assert torch.equal(tiny.denoise(transformer), plain)


def test_no_flag_stays_on_library_classes():
    from cache_dit.caching.block_adapters.block_adapters import FakeDiffusionPipeline

    run(tiny.wan(), dbcache())
    assert "_is_cached" not in vars(FakeDiffusionPipeline)


def test_stdout_stays_empty(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture):
    transformer, log = tiny.wan(), logging.getLogger("CACHE_DIT")
    before = [(handler, dict(vars(handler))) for handler in log.handlers]
    with (
        caplog.at_level(logging.INFO, log.name),
        step_cache(transformer, ALWAYS, steps=9, guided=True),
    ):
        tiny.denoise(transformer, steps=9)
        log.info("an info message")
        log.error("an error message")
    output = capfd.readouterr()
    assert output.out == ""
    assert "an error message" in output.err
    assert "an info message" not in output.err
    assert before
    assert all(vars(handler) == state for handler, state in before)


@pytest.mark.slow
def test_stdout_stays_empty_in_a_process_that_logs_everything():
    script = (
        "from tests.caching import tiny\n"
        "from wancli.caching.step_cache import step_cache\n"
        "from wancli.config.settings import StepCache\n"
        "transformer = tiny.wan()\n"
        "settings = StepCache(step_cache='cachedit', cachedit_fn=1)\n"
        "with step_cache(transformer, settings, steps=9, guided=True):\n"
        "    tiny.denoise(transformer, steps=9)\n"
        "    import logging; logging.getLogger('CACHE_DIT').error('an error message')\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"CACHE_DIT_LOG_LEVEL": "info"},
    )
    assert process.stdout == ""
    assert "an error message" in process.stderr


@pytest.mark.parametrize(
    ("build", "guided", "settings", "computed"),
    [
        (tiny.wan, True, dbcache(), {2, 5}),
        (tiny.wan, True, dbcache(cachedit_bn=2), {4, 5}),
        (tiny.wan, False, ALWAYS, {2, 5}),
        (tiny.vace, True, ALWAYS, {2, 5}),
        (tiny.hunyuan, False, dbcache(cachedit_residual_threshold=0.3), {2 + 2, 2 + 5, 5 + 5}),
    ],
)
def test_stats_describe_each_forward(build, guided, settings, computed):
    transformer, blocks = build(), tiny.Blocks()
    with blocks.counted(transformer):
        _, stats = run(transformer, settings, guided=guided)
    assert [use.blocks for use in stats] == blocks.of_forwards
    assert {use.blocks_all for use in stats} == {max(blocks.of_forwards)}
    assert set(blocks.of_forwards) == computed
    branches = ["cond", "uncond"] if guided else ["cond"]
    expected = [(step, branch) for step in range(tiny.STEPS) for branch in branches]
    assert [(use.step, use.branch) for use in stats] == expected
    assert not any(use.reused or use.residual for use in stats if use.step < 3)
    assert all(use.reused == (use.blocks < use.blocks_all) for use in stats)


@pytest.mark.parametrize(("order", "guided"), [(None, True), (1, False), (2, True)])
def test_its_size_is_that_of_the_plan(order, guided):
    transformer = tiny.wan()
    taylorseer = {"taylorseer": True, "taylorseer_order": order} if order else {}
    settings = NEVER.model_copy(update=taylorseer)
    with step_cache(transformer, settings, steps=tiny.STEPS + 1, guided=guided):
        tiny.denoise(transformer, guided=guided)  # a step is left, after which it is freed
        manager = transformer._context_manager
        tensors = cached_tensors(manager)
    assert not cached_tensors(manager)  # freed at the end
    tokens = 2 * 4 * 4
    nbytes = sum(t.nbytes for t in tensors if t.shape[1] == tokens)
    assert nbytes == step_cache_bytes(
        tokens=tokens,
        dim=24,
        branches=2 if guided else 1,
        bytes_per_element=4,
        taylorseer_order=order,
    )


@pytest.mark.parametrize("order", [None, 1])
def test_its_size_for_two_block_lists_and_text_is_that_of_the_plan(order):
    transformer = tiny.hunyuan()
    taylorseer = {"taylorseer": True, "taylorseer_order": order} if order else {}
    with step_cache(
        transformer, NEVER.model_copy(update=taylorseer), steps=tiny.STEPS + 1, guided=False
    ):
        tiny.denoise(transformer, guided=False)
        tensors = cached_tensors(transformer._context_manager)
    nbytes = sum(t.nbytes for t in tensors if t.ndim == 3)
    assert nbytes == 2 * step_cache_bytes(
        tokens=2 * 4 * 4,
        text=7,
        dim=32,
        branches=1,
        bytes_per_element=4,
        taylorseer_order=order,
    )


def test_leaving_no_block_to_reuse_is_rejected_by_the_transformer_too():
    with pytest.raises(PlanError, match="none of 5 blocks"):
        run(tiny.wan(), dbcache(cachedit_fn=6))


def test_without_a_step_cache_nothing_is_changed():
    transformer = tiny.wan()
    before = tiny.traces(transformer)
    with step_cache(transformer, StepCache(), steps=tiny.STEPS, guided=True) as session:
        assert tiny.traces(transformer) == before
        tiny.denoise(transformer)
        session.skip()
    assert session.stats() == []
