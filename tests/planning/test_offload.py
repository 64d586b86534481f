"""Rules about offload, VAE tiling and VAE dtypes."""

from dataclasses import replace
from typing import Any

import pytest

from wancli.catalog.local import find_spec
from wancli.catalog.wan import WAN_2_1_I2V
from wancli.config.resolve import Layer, resolve
from wancli.config.settings import RolloutSettings, Settings
from wancli.cost.totals import generation_cost, rollout_cost
from wancli.errors import PlanError
from wancli.planning.inputs import InputFiles
from wancli.planning.offload import OFFLOADS
from wancli.planning.plan import make_plan, make_rollout_plan


def settings(**tables: Any) -> Settings:
    return resolve([Layer("flag", tables)], Settings).settings


def rollout_settings(**tables: Any) -> RolloutSettings:
    return resolve([Layer("flag", tables)], RolloutSettings).settings


CACHED = {"step_cache": "cachedit", "cachedit_fn": 1}
FREED = {"free_kv_weights": True}
REJECTED = [
    ({"machine": {"device": "cpu", "offload": "group"}}, "has them in RAM already"),
    ({"machine": {"device": "mps", "offload": "model"}}, "has them in RAM already"),
    ({"machine": {"offload": "model"}, "prompt_kv": FREED}, "both move the same weights"),
    ({"machine": {"device": "cpu", "vae_dtype": "float16"}}, "`vae_dtype` float16"),
    (
        {"machine": {"vae_tiling": True}, "video": {"width": 256, "height": 256}},
        "`vae_tiling` does nothing at 256x256",
    ),
]


@pytest.mark.parametrize(("tables", "words"), REJECTED)
def test_incompatible_settings_are_rejected(tables: dict[str, Any], words: str):
    with pytest.raises(PlanError, match=words):
        make_plan(settings(**tables), find_spec("demo"))


@pytest.mark.parametrize("offload", ["model", "group", "sequential"])
def test_vace_with_a_step_cache_is_not_offloaded(offload: str):
    spec, inputs = find_spec("wan2.1-vace-1.3b"), InputFiles()
    with pytest.raises(PlanError, match="both replace the forward"):
        make_plan(settings(machine={"offload": offload}, step_cache=CACHED), spec, inputs)
    assert make_plan(settings(step_cache=CACHED), spec, inputs).offloads == ("none",)
    assert make_plan(settings(), spec, inputs).offloads == tuple(OFFLOADS)


def test_auto_does_not_offload_when_kv_weights_are_freed():
    assert make_plan(settings(prompt_kv=FREED), find_spec("demo")).offloads == ("none",)


def test_rollouts_support_offload_but_not_vae_tiling():
    spec = find_spec("demo")
    for offload in OFFLOADS:
        machine = {"device": "cuda", "offload": offload}
        assert make_rollout_plan(rollout_settings(machine=machine), spec).offloads
    with pytest.raises(PlanError, match="`vae_tiling` does not work in rollouts"):
        make_rollout_plan(rollout_settings(machine={"vae_tiling": True}), spec)


def test_model_offload_keeps_the_vae_of_a_rollout_on_the_device():
    requested, spec = rollout_settings(), find_spec("demo")
    cost = rollout_cost(requested, spec, make_rollout_plan(requested, spec), wide=True)
    assert cost
    weights, both = cost.weights, cost.weights["transformer"] + cost.weights["vae"]
    assert (
        cost.resident_weights["model"]["denoise"]
        == cost.resident_weights["model"]["decode"]
        == both
    )
    assert cost.resident_weights["model"]["encode"] == weights["text_encoder"] + weights["vae"]


def test_a_bfloat16_vae_takes_half_the_memory_and_tiling_less_still():
    spec = replace(find_spec("wan2.1-t2v-1.3b"), architecture=WAN_2_1_I2V)

    def decode(**machine: Any) -> tuple[int, int]:
        requested = settings(machine=machine)
        cost = generation_cost(requested, spec, make_plan(requested, spec), wide=False)
        assert cost
        return cost.weights["vae"], cost.activations["decode"]

    wide, narrow, tiled = decode(), decode(vae_dtype="bfloat16"), decode(vae_tiling=True)
    assert [2 * n for n in narrow] == pytest.approx(list(wide), abs=1)
    assert tiled[0] == wide[0]
    assert tiled[1] < wide[1] / 3


def test_on_a_gpu_the_decoder_is_narrow_and_takes_three_latents():
    spec = replace(find_spec("wan2.1-t2v-1.3b"), architecture=WAN_2_1_I2V)

    def decode(kind: str, **machine: Any) -> tuple[int, int]:
        requested = settings(machine=machine)
        plan = make_plan(requested, spec)
        cost = generation_cost(requested, spec, plan, wide=False, kind=kind)
        assert cost
        return cost.weights["vae"], cost.activations["decode"]

    exact = decode("cpu")
    assert decode("cuda", vae_exact=True) == exact
    fast, wide = decode("cuda"), decode("cuda", vae_dtype="float32")
    assert exact[0] / 2 < fast[0] < wide[0] == exact[0]
    assert 2 * fast[1] == pytest.approx(wide[1], rel=0.05)
    assert wide[1] > exact[1]
