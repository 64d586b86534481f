"""diffusers' own step caches on Wan reuse steps, keep branches apart, and are removed again."""

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig

from tests.caching import tiny
from wancli.caching.step_cache import step_cache
from wancli.config.settings import StepCache
from wancli.planning.step_caches import MAG_RATIOS, STEP_CACHES

RATIOS = MAG_RATIOS["wan2.1-t2v-1.3b"]
THRESHOLDS = {"first-block": 0.1, "magcache": 0.06, "seacache": 0.25}
REUSED_BLOCKS = {"first-block": 1, "magcache": 0, "seacache": 0}
every_method = pytest.mark.parametrize("method", THRESHOLDS)


def cached(transformer, method, *, threshold=None, guided=True, steps=tiny.STEPS):
    return step_cache(
        transformer,
        StepCache(step_cache=method, step_cache_threshold=threshold or THRESHOLDS[method]),
        steps=steps,
        guided=guided,
        mag_ratios=RATIOS,
    )


def reused(session, branch):
    return [use.step for use in session.stats() if use.reused and use.branch == branch]


def test_every_available_method_is_tested():
    assert set(STEP_CACHES["WanTransformer3DModel"].hooks) == set(THRESHOLDS)


@every_method
def test_skipped_blocks_are_reported(method):
    transformer, blocks = tiny.wan(), tiny.Blocks()
    plain = tiny.denoise(transformer)
    with cached(transformer, method) as session, blocks.counted(transformer):
        latents = tiny.denoise(transformer)
    uses = session.stats()
    assert [use.blocks for use in uses] == blocks.of_forwards
    assert set(blocks.of_forwards) == {REUSED_BLOCKS[method], tiny.LAYERS}
    assert {use.blocks_all for use in uses} == {tiny.LAYERS}
    assert [use.reused for use in uses] == [use.blocks < tiny.LAYERS for use in uses]
    assert [(u.step, u.branch) for u in uses] == [
        (step, branch) for step in range(tiny.STEPS) for branch in ("cond", "uncond")
    ]
    error = (latents - plain).abs().max()
    assert 0 < error < 0.1 * plain.abs().max()


@every_method
def test_a_threshold_that_is_never_met_changes_nothing(method):
    transformer = tiny.wan()
    plain = tiny.denoise(transformer)
    with cached(transformer, method, threshold=1e-9) as session:
        assert torch.equal(tiny.denoise(transformer), plain)
    assert not reused(session, "cond")


@every_method
def test_the_default_threshold_is_that_of_diffusers(method):
    transformer = tiny.wan()
    settings = StepCache(step_cache=method)
    with step_cache(transformer, settings, steps=9, guided=True, mag_ratios=RATIOS):
        assert transformer._cache_config.threshold == type(transformer._cache_config).threshold


@every_method
def test_a_second_generation_equals_the_first(method):
    transformer = tiny.wan()
    latents, stats = [], []
    for seed in (0, 1, 0):
        with cached(transformer, method) as session:
            latents.append(tiny.denoise(transformer, seed=seed))
        stats.append(session.stats())
    assert torch.equal(latents[0], latents[2])
    assert stats[0] == stats[2]


@every_method
def test_the_transformer_is_restored(method):
    transformer = tiny.wan()
    before = tiny.traces(transformer)
    plain = tiny.denoise(transformer)
    with cached(transformer, method):
        tiny.denoise(transformer)
    with pytest.raises(RuntimeError, match="more forwards"):
        fail_midway(transformer, method)
    assert not transformer.is_cache_enabled
    assert torch.equal(tiny.denoise(transformer), plain)
    vars(transformer).pop("_diffusers_hook")  # left by cache_context of the plain loop
    assert tiny.traces(transformer) == before


def fail_midway(transformer, method):
    with cached(transformer, method, steps=2):
        tiny.denoise(transformer)


@every_method
def test_cond_does_not_depend_on_uncond(method):
    transformer = tiny.wan()

    def cond_velocities(*branches):
        """Cond velocities for fixed latents."""
        velocities = []
        guided = len(branches) > 1
        with torch.no_grad(), cached(transformer, method, guided=guided) as session:
            for index in range(tiny.STEPS):
                for branch in branches:
                    sigma = 1 - index / tiny.STEPS
                    step = {"step_index": index, "sigma": sigma, "num_inference_steps": tiny.STEPS}
                    with transformer.cache_context(branch, **step):
                        (velocity,) = transformer(
                            hidden_states=tiny.draw(1, 4, 2, 8, 8) * (1 + 0.1 * sigma),
                            timestep=torch.tensor([1000 * sigma]),
                            return_dict=False,
                            **tiny.inputs_of(transformer, branch),
                        )
                    if branch == "cond":
                        velocities.append(velocity)
        assert all(reused(session, branch) for branch in branches)
        return velocities

    alone, guided = cond_velocities("cond"), cond_velocities("cond", "uncond")
    assert all(torch.equal(one, other) for one, other in zip(alone, guided, strict=True))


@every_method
def test_both_experts_of_a_pipeline_reuse_steps(method):
    pipeline = tiny.pipeline(experts=2)
    pipeline.scheduler.set_timesteps(24)
    early = int((pipeline.scheduler.timesteps >= 500).sum())
    with (
        cached(pipeline.transformer, method, steps=early) as first,
        cached(pipeline.transformer_2, method, steps=24 - early) as second,
    ):
        tiny.generate(pipeline, steps=24)
    assert reused(first, "cond")
    assert reused(second, "cond")
    assert not second.stats()[0].reused


@pytest.mark.parametrize(
    "config",
    [
        FirstBlockCacheConfig(threshold=0.5),
        MagCacheConfig(threshold=10, retention_ratio=0, mag_ratios=[1.0] * 28),
    ],
    ids=["first-block", "magcache"],
)
def test_reuse_on_the_same_input_is_exact_on_wan_and_wrong_on_vace(config):
    """Why VACE supports none: its hints are added to a reused output that already has them."""
    error = {}
    for name, transformer in {"wan": tiny.wan(), "vace": tiny.vace()}.items():
        inputs = tiny.inputs_of(transformer, "cond") | {
            "hidden_states": tiny.draw(1, 4, 2, 8, 8),
            "timestep": torch.tensor([500.0]),
        }
        transformer.enable_cache(config)
        with torch.no_grad(), transformer.cache_context("cond"):
            computed, again = (transformer(**inputs, return_dict=False)[0] for _ in range(2))
        error[name] = float((again - computed).abs().max())
    assert error["wan"] < 1e-6
    assert error["vace"] > 0.1


def test_hunyuan_reuses_and_reports_blocks_of_both_lists():
    transformer, blocks = tiny.hunyuan(), tiny.Blocks()
    plain = tiny.denoise(transformer)
    with (
        cached(transformer, "first-block", threshold=0.3) as session,
        blocks.counted(transformer),
    ):
        latents = tiny.denoise(transformer)
    assert [use.blocks for use in session.stats()] == blocks.of_forwards
    assert set(blocks.of_forwards) == {1, 2 * tiny.LAYERS}
    error = (latents - plain).abs().max()
    assert 0 < error < 0.1 * plain.abs().max()


def test_hunyuan_reuses_its_own_output():
    transformer = tiny.hunyuan()
    inputs = tiny.inputs_of(transformer, "cond") | {
        "hidden_states": tiny.draw(1, 4, 2, 8, 8),
        "timestep": torch.tensor([500.0]),
    }
    with (
        cached(transformer, "first-block") as session,
        torch.no_grad(),
        transformer.cache_context("cond"),
    ):
        computed, again = (transformer(**inputs, return_dict=False)[0] for _ in range(2))
    assert [use.reused for use in session.stats()] == [False, True]
    assert torch.allclose(again, computed, atol=1e-6)


@pytest.mark.parametrize("method", ["first-block", "magcache"])
def test_image_to_video_reuses_steps(method):
    transformer = tiny.wan(**tiny.I2V)
    with cached(transformer, method, threshold=0.2) as session:
        tiny.denoise(transformer)
    assert reused(session, "cond")
