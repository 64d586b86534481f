"""The predicted cost of a run equals the measured one, on models small enough to run."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from tests.fakes import tiny_folder, tiny_image_encoder, tiny_transformer
from tests.shapes import flops, parameters
from wancli.caching.prompt_kv import PromptKVCache, prompt_kv
from wancli.catalog.local import find_spec
from wancli.catalog.specs import ModelSpec
from wancli.catalog.tasks import ANIMATE, ENDS, IMAGE
from wancli.catalog.wan import DEMO, WAN_2_1_I2V, Architecture, Transformer
from wancli.config.resolve import Layer, resolve
from wancli.config.settings import Machine, RolloutSettings, Settings
from wancli.cost.totals import Cost, generation_cost, rollout_cost
from wancli.cost.wan import (
    denoise_flops,
    image_tokens,
    prompt_bytes,
    rolling_bytes,
    rollout_forwards,
)
from wancli.cost.wan_transformer import image_flops
from wancli.models.load import load_pipeline
from wancli.planning.inputs import NO_INPUTS, add_required_inputs
from wancli.planning.offload import OFFLOADS
from wancli.planning.plan import RolloutPlan, make_plan, make_rollout_plan
from wancli.rollouts.denoiser import PromptPair, causal

TINY = Transformer(
    layers=2, heads=2, head_dim=12, ffn=32, in_channels=4, out_channels=4, text_dim=16, freq_dim=16
)
SPEC = ModelSpec(
    "tiny", "", "", latent_channels=4, text_length=9, causal=True, architecture=Architecture(TINY)
)


def cost_of(model: str, *, wide: bool = False, **tables: object) -> Cost:
    settings = resolve([Layer("flag", {"model": model, **tables})], Settings).settings
    spec = find_spec(model)
    cost = generation_cost(settings, spec, make_plan(settings, spec), wide=wide)
    assert cost
    return cost


def tiny_rollout(trim: Literal["before", "after"], **others: bool) -> RolloutPlan:
    tables = {
        "video": {"width": 48, "height": 32},
        "rollout": {
            "chunks": 4,
            "chunk_frames": 2,
            "rolling_window": 4 if others.get("kv_recompute") else 5,  # its context is one part
            "trim": trim,
            "sink_frames": 1 if trim == "before" else 0,
            **others,
        },
        "sampling": {"guidance_scale": 1.0},
    }
    settings = resolve([Layer("flag", tables)], RolloutSettings).settings
    return make_rollout_plan(settings, SPEC, context_frames=2)


@pytest.mark.parametrize("kv_recompute", [False, True])
@pytest.mark.parametrize("trim", ["before", "after"])
def test_forwards_and_flops_of_a_rollout_match_the_plan(
    trim: Literal["before", "after"], kv_recompute: bool
):
    plan = tiny_rollout(trim, kv_recompute=kv_recompute)
    forwards = rollout_forwards(SPEC, plan)
    assert sum(forwards.values()) == plan.forwards
    planned = denoise_flops(TINY, forwards, fresh=1).flops
    latents = torch.zeros(1, 4, 2, 4, 6)
    with causal(tiny_transformer(), plan.window, rope=plan.rope) as model:

        def roll() -> None:
            model.set_prompt(PromptPair(torch.zeros(1, 9, 16)))
            chunks = [(span, 0) for span in plan.context] + list(
                zip(plan.spans, plan.steps, strict=True)
            )
            for number, (span, steps) in enumerate(chunks):
                model.begin(span)
                for step in range(steps):
                    model.velocity(latents, 900.0 - number - 10 * step)
                if number < len(chunks) - 1:
                    model.commit(latents, 1.0 + number / 10)

        assert flops(roll) == planned
        assert model.nbytes == rolling_bytes(TINY, plan.window, plan.rope, element_bytes=4)


def test_the_size_of_a_cached_prompt_matches_the_plan():
    model, memory = tiny_transformer(), PromptKVCache()
    with torch.no_grad(), prompt_kv(model, memory):
        model(torch.zeros(1, 4, 1, 4, 6), torch.ones(1), torch.zeros(1, 9, 16))
    assert memory.nbytes == prompt_bytes(SPEC, element_bytes=4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_size_of_weights_matches_the_plan(dtype: Literal["float32", "bfloat16"]):
    pipeline = load_pipeline(find_spec("demo"), Machine(device="cpu", dtype=dtype)).pipeline
    planned = cost_of("demo", wide=dtype == "float32").weights
    for part, size in planned.items():
        nbytes = sum(p.numel() * p.element_size() for p in getattr(pipeline, part).parameters())
        assert (part, size) == (part, nbytes)


def test_guidance_doubles_the_forwards_and_experts_the_weights():
    one = cost_of("wan2.1-t2v-14b", sampling={"guidance_scale": 1.0})
    two = cost_of("wan2.1-t2v-14b")
    assert two.forwards == 2 * one.forwards
    assert two.work["denoise"].flops == 2 * one.work["denoise"].flops
    experts = cost_of("wan2.2-t2v-a14b")
    assert experts.weights["transformer_2"] == experts.weights["transformer"]
    assert experts.resident() - two.resident() > experts.weights["transformer_2"]
    assert experts.resident("model") < two.resident()


def test_an_uncached_prompt_costs_flops_and_no_memory():
    cached = cost_of("wan2.1-t2v-1.3b")
    uncached = cost_of("wan2.1-t2v-1.3b", prompt_kv={"prompt_kv": False})
    assert uncached.work["denoise"].flops > cached.work["denoise"].flops
    assert uncached.cache_bytes["prompt_kv"] == 0


def test_stronger_offload_keeps_fewer_weights_resident():
    for model in ("wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.2-ti2v-5b", "demo"):
        cost = cost_of(model)
        resident = [cost.resident(offload) for offload in OFFLOADS]
        assert resident == sorted(resident, reverse=True)
        assert resident[0] > resident[1]


def test_an_image_model_encodes_an_image_and_a_video():
    spec = replace(find_spec("wan2.1-t2v-14b"), architecture=WAN_2_1_I2V)
    settings = resolve([Layer("flag", {"video": {"num_frames": 5}})], Settings).settings
    cost = generation_cost(settings, spec, make_plan(settings, spec), wide=False)
    assert cost
    assert cost.parameters["image_encoder"] > 6e8
    assert cost.work["encode"].convolution > 0


@pytest.mark.parametrize(("task", "images"), [(IMAGE, 1), (ENDS, 2), (ANIMATE, 1)])
def test_the_image_encoder_of_a_folder_is_counted(tmp_path: Path, task: str, images: int):
    tiny_folder(tmp_path, task)
    spec = find_spec(str(tmp_path))
    encoder = spec.wan.image_encoder
    assert encoder
    tables = {"video": {"num_frames": 5, "width": 32, "height": 32}}
    settings = resolve([Layer("flag", tables)], Settings).settings
    plan = make_plan(settings, spec, add_required_inputs(spec, NO_INPUTS))
    cost = generation_cost(settings, spec, plan, wide=True)
    assert cost
    assert cost.parameters["image_encoder"] == parameters(tiny_image_encoder()["image_encoder"])
    assert image_tokens(spec.wan) == images * 5
    without = replace(spec, architecture=replace(spec.wan, image_encoder=None))
    less = generation_cost(settings, without, plan, wide=True)
    assert less
    image_work = cost.work["encode"].matmul - less.work["encode"].matmul
    assert image_work == images * image_flops(encoder).matmul


def test_the_window_bounds_the_cache_of_a_rollout():
    def rollout(chunks: int, window: int) -> Cost:
        tables = {"rollout": {"chunks": chunks, "rolling_window": window}}
        settings = resolve([Layer("flag", tables)], RolloutSettings).settings
        spec = find_spec("demo")
        cost = rollout_cost(settings, spec, make_rollout_plan(settings, spec), wide=True)
        assert cost
        return cost

    assert rollout(50, 6).cache_bytes == rollout(10, 6).cache_bytes
    assert rollout(50, 0).cache_bytes["rolling_kv"] == 5 * rollout(10, 0).cache_bytes["rolling_kv"]
    assert rollout(50, 6).store == 5 * rollout(10, 6).store
    assert rollout(50, 6).flops < rollout(50, 0).flops


def test_a_model_of_unknown_shape_has_no_cost():
    settings = resolve([], Settings).settings
    spec = replace(find_spec("demo"), architecture=None)
    assert generation_cost(settings, spec, make_plan(settings, spec), wide=True) is None
    assert find_spec("demo").architecture == DEMO
