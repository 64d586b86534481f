"""cache-dit's step cache under torch.compile and every kind of offload: exact or rejected."""

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook  # type: ignore[import-untyped]
from diffusers.hooks import apply_group_offloading

from tests.caching import tiny
from wancli.caching import step_cache as module
from wancli.caching.step_cache import step_cache
from wancli.errors import PlanError

CPU = torch.device("cpu")
DBCACHE = tiny.DBCACHE


def run(transformer, settings):
    with step_cache(transformer, settings, steps=tiny.STEPS, guided=True) as session:
        return tiny.denoise(transformer), session.stats()


def reused(uses):
    return [use.step for use in uses if use.reused]


def test_a_transformer_compiled_as_a_whole_is_rejected():
    compiled = tiny.wan()
    compiled.compile(backend="eager")
    for transformer in (compiled, torch.compile(tiny.wan(), backend="eager")):
        with (
            pytest.raises(PlanError, match="compiled as a whole"),
            step_cache(transformer, DBCACHE, steps=tiny.STEPS, guided=True),
        ):
            raise AssertionError("entered")


@pytest.mark.slow
def test_blocks_compiled_one_by_one_reuse_the_same_steps_without_graph_breaks():
    transformer = tiny.wan()
    eager, uses = run(transformer, DBCACHE)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    for _ in range(2):
        compiled, compiled_uses = run(transformer, DBCACHE)
        assert torch.equal(compiled, eager)
        assert reused(compiled_uses) == reused(uses) != []
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("kind", ["model", "sequential", "leaf"])
def test_an_offloaded_model_gives_the_same_latents_and_stays_offloaded(kind):
    transformer = tiny.wan()
    plain, (cached, uses) = tiny.denoise(transformer), run(transformer, DBCACHE)
    if kind == "model":
        cpu_offload_with_hook(transformer, execution_device="cpu")
    elif kind == "sequential":
        cpu_offload(transformer, execution_device=CPU)
    else:
        apply_group_offloading(transformer, onload_device=CPU, offload_type="leaf_level")
    tiny.denoise(transformer)  # cache_context leaves a registry
    before = tiny.traces(transformer)
    latents, offloaded_uses = run(transformer, DBCACHE)
    assert torch.equal(latents, cached)
    assert offloaded_uses == uses
    assert tiny.traces(transformer) == before
    assert torch.equal(tiny.denoise(transformer), plain)


@pytest.mark.parametrize(("bn", "group"), [(0, 4), (1, 2), (2, 3), (2, 2), (1, 3)])
def test_last_blocks_that_start_inside_an_offload_group_are_rejected(bn, group, monkeypatch):
    transformer = tiny.wan()
    apply_group_offloading(
        transformer, onload_device=CPU, offload_type="block_level", num_blocks_per_group=group
    )
    unfetched = watch_fetches(transformer)
    settings = DBCACHE.model_copy(
        update={"cachedit_bn": bn, "cachedit_fn": 1, "cachedit_residual_threshold": 1.0}
    )
    valid = bn == 0 or (tiny.LAYERS - bn) % group == 0
    if not valid:
        with pytest.raises(PlanError, match="begins inside a group"):
            run(transformer, settings)
        monkeypatch.setattr(module, "_check_groups", lambda *_: None)
    assert reused(run(transformer, settings)[1])
    assert bool(unfetched) == (not valid)


def watch_fetches(transformer):
    """A list of the blocks that ran while their offload group was not fetched."""
    fetched, unfetched = set(), []
    for index, block in enumerate(transformer.blocks):
        group = block._diffusers_hook.get_hook("group_offloading").group
        group.onload_ = lambda group=group: fetched.add(id(group))
        group.offload_ = lambda group=group: fetched.discard(id(group))

        def look(*_, group=group, index=index):
            if id(group) not in fetched:
                unfetched.append(index)

        block.attn1.register_forward_pre_hook(look)
    return unfetched


def test_group_offload_with_streams_is_rejected():
    transformer = tiny.wan()
    apply_group_offloading(transformer, onload_device=CPU, offload_type="leaf_level")
    hook = transformer.patch_embedding._diffusers_hook.get_hook("group_offloading")
    hook.config.stream = object()  # a real one needs a GPU
    with pytest.raises(PlanError, match="streams"):
        run(transformer, DBCACHE)


def test_an_offloaded_vace_is_rejected():
    transformer = tiny.vace()
    cpu_offload_with_hook(transformer, execution_device="cpu")
    with pytest.raises(PlanError, match="cannot be offloaded"):
        run(transformer, DBCACHE)
