from contextlib import nullcontext

import pytest

from wancli.catalog.local import find_spec
from wancli.config.resolve import Layer, resolve
from wancli.config.settings import RolloutSettings, Settings
from wancli.cost.totals import generation_cost
from wancli.errors import PlanError, SettingsError
from wancli.planning.plan import check_unused_settings, make_plan
from wancli.planning.rules_rollout import check_rollout_flags

DEMO = {"sampling": {"steps": 20, "guidance_scale": 2.5}}
SMALL = {"num_frames": 33, "width": 96, "height": 96}


def settings(**tables: dict[str, object]) -> Settings:
    groups = {**DEMO, "video": SMALL, **tables}
    return resolve([Layer("flag", groups)], Settings).settings


def gated(gate: float) -> Settings:
    return settings(step_cache={"cfg_gate": gate})


@pytest.mark.parametrize(("gate", "step"), [(12, 12), (0.6, 12), (0.01, 1), (0.51, 11)])
def test_a_gate_is_a_step_or_a_fraction_of_the_steps(gate: float, step: int):
    plan = make_plan(gated(gate), find_spec("demo"))
    assert plan.gate == step
    assert plan.forwards == 20 + step


@pytest.mark.parametrize("gate", [20, 25, 1.5, 0.999])
def test_a_gate_that_is_not_a_step_or_never_reached_is_rejected(gate: float):
    with pytest.raises(PlanError, match="`cfg_gate "):
        make_plan(gated(gate), find_spec("demo"))


def test_without_a_gate_every_step_has_both_branches():
    assert make_plan(settings(), find_spec("demo")).forwards == 40


def test_more_tokens_along_an_axis_than_rotary_positions_are_rejected():
    with pytest.raises(PlanError, match="1025 tokens .* 1024") as refused:
        make_plan(settings(video={**SMALL, "num_frames": 4097}), find_spec("demo"))
    assert "`num_frames 4093`" in str(refused.value.hint)


def cached(**step_cache: object) -> Settings:
    table = {"step_cache": "cachedit", "cachedit_fn": 1, **step_cache}
    return settings(step_cache=table, machine={"dtype": "float32"})


def test_the_plan_predicts_the_size_of_a_step_cache():
    spec = find_spec("demo")

    def cached_bytes(requested: Settings, *, wide: bool = True) -> int:
        cost = generation_cost(requested, spec, make_plan(requested, spec), wide=wide)
        assert cost
        return cost.cache_bytes["step_cache"]

    numbers = 2 * make_plan(cached(), spec).tokens * spec.dim
    assert cached_bytes(cached()) == 2 * numbers * 4
    assert cached_bytes(cached(), wide=False) == 2 * numbers * 2
    assert cached_bytes(cached(taylorseer=True, taylorseer_order=2)) == 7 * numbers * 4
    assert cached_bytes(settings()) == 0


@pytest.mark.parametrize(
    "table",
    [
        {"cachedit_fn": 4},
        {"taylorseer": True},
        {"cachedit_residual_threshold": 0.1, "step_cache": "seacache"},
        {"step_cache_threshold": 0.1},
        {"step_cache_threshold": 0.1, "step_cache": "cachedit"},
    ],
)
def test_an_unused_flag_is_rejected(table: dict[str, object]):
    with pytest.raises(PlanError, match="does nothing without `step_cache`"):
        check_unused_settings(resolve([Layer("flag", {"step_cache": table})], Settings))


@pytest.mark.parametrize("value", [True, False])
def test_what_waits_for_a_new_prompt_is_refused_as_a_flag_and_not_in_a_preset(*, value: bool):
    table = {"rollout": {"recache": value, "shot_offset": 8 * value}}
    preset, flag = (resolve([Layer(name, table)], RolloutSettings) for name in ("preset", "flag"))
    check_rollout_flags(preset, changes=False)
    check_rollout_flags(flag, changes=True)
    with pytest.raises(PlanError, match="without a change") if value else nullcontext():
        check_rollout_flags(flag, changes=False)


def test_a_preset_may_set_options_of_a_cache_that_a_flag_turns_off():
    preset = Layer("preset fast", {"step_cache": {"step_cache": "cachedit", "taylorseer": True}})
    resolved = resolve([preset, Layer("flag", {"step_cache": {"step_cache": "none"}})], Settings)
    check_unused_settings(resolved)
    make_plan(resolved.settings, find_spec("wan2.1-t2v-1.3b"))


KEY = {"model": "demo", "sampling.steps": 20, "machine.dtype": "float32"}


def test_a_tuned_step_cache_is_rejected_with_other_settings():
    tuned = Layer("preset t", {"step_cache": {"step_cache": "cachedit"}}, KEY)
    same = resolve([Layer("flag", DEMO), tuned], Settings)
    assert same.tuned_for == KEY
    with pytest.raises(SettingsError, match="tuned for sampling.steps 20, not 12"):
        resolve([tuned, Layer("flag", {"sampling": {"steps": 12}})], Settings)


def test_a_tuned_step_cache_that_a_flag_turns_off_is_not_checked():
    tuned = Layer("preset t", {"step_cache": {"step_cache": "cachedit"}}, KEY)
    flags = Layer("flag", {"step_cache": {"step_cache": "none"}, "sampling": {"steps": 12}})
    assert resolve([tuned, flags], Settings).tuned_for == {}
