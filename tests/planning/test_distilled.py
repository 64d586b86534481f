import re
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.conftest import Wancli
from tests.models.test_lora import random_lora
from wancli.config.presets import find_preset, layers
from wancli.config.resolve import Layer, Resolved, resolve
from wancli.config.settings import Settings
from wancli.errors import PlanError, PlanWarning
from wancli.planning.distilled import check_distilled, distilled_warnings, preset_of
from wancli.planning.plan import check_unused_settings

HIGH = "wan2.2_t2v_A14b_high_noise_lora_rank64_lightx2v_4step_1217.safetensors"
LOW = HIGH.replace("high", "low")


def resolved(lora: str, **sampling: object) -> Resolved[Settings]:
    trained = {"scheduler": "euler", "steps_list": "1000,750,500,250", "flow_shift": 5.0}
    values = trained | {"guidance_scale": 1.0} | sampling
    tables = {"sampling": values, "machine": {"lora": [lora]}}
    return resolve([Layer("preset x", tables)], Settings)


@pytest.mark.parametrize("name", [HIGH, f"a/b/{HIGH}@high=0.5", f"some/repo:{HIGH}@high"])
def test_guidance_is_refused_with_a_distilled_lora_by_the_name_of_its_file(name: str):
    with pytest.raises(PlanError, match="without guidance; `guidance_scale` is 3.5") as error:
        check_distilled(resolved(name, guidance_scale=3.5))
    assert error.value.hint == "`preset wan2.2-t2v-a14b-4step`"
    check_distilled(resolved(name))


def test_the_preset_of_a_lora_is_known_by_the_name_of_its_file():
    for name in ("demo-4step", "a/demo-4step.safetensors"):
        assert preset_of(name) == "demo-4step"
    assert preset_of(Path(HIGH)) == "wan2.2-t2v-a14b-4step"
    assert preset_of("mine.safetensors") == ""


def test_each_expert_has_guidance_of_its_own():
    check_distilled(resolved(f"{LOW}@low", guidance_scale=3.5, guidance_scale_2=1.0))
    with pytest.raises(PlanError, match="`guidance_scale_2` is 2"):
        check_distilled(resolved(f"{LOW}@low", guidance_scale=3.5, guidance_scale_2=2.0))


def test_other_timesteps_than_those_of_training_are_warned_of():
    for lora, changes in ((HIGH, {}), ("mine.safetensors", {"flow_shift": 8.0})):
        assert distilled_warnings(resolved(lora, **changes)) == ()
    text = f"LoRA {HIGH} was distilled for `scheduler euler`, `flow_shift 5`."
    assert distilled_warnings(resolved(HIGH, scheduler="unipc", flow_shift=8.0)) == (
        PlanWarning(text, "`preset wan2.2-t2v-a14b-4step`"),
    )


def hint_of(flags: dict[str, str], preset: str) -> str | None:
    """The hint about the demo's LoRA under these flags, if anything is wrong with them."""
    tables = {"sampling": flags, "machine": {"lora": ["demo-4step"]}}
    typed = resolve([*layers(find_preset(preset)), Layer("flag", tables)], Settings)
    try:
        check_unused_settings(typed)
    except PlanError as error:
        return error.hint
    return next((warning.hint for warning in distilled_warnings(typed)), None)


def follow(flags: dict[str, str], preset: str, steps: int) -> None:
    """Type each way out of a hint until nothing is wrong, which takes no more than `steps`."""
    hint = hint_of(flags, preset)
    assert hint is None or steps > 0, hint
    for way in hint.split(", or ") if hint else ():
        typed = dict(text.split(" ") for text in re.findall("`(.*?)`", way))
        then = typed.pop("preset", preset)
        follow(flags | typed, then, steps - 1)


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ({}, 1),  # guidance and timesteps at once
        ({"scheduler": "euler"}, 1),
        ({"scheduler": "few-step"}, 0),  # whose own list is the LoRA's
        ({"scheduler": "few-step", "guidance_scale": "2"}, 1),
        ({"guidance_scale": "2"}, 1),
        ({"scheduler": "unipc", "guidance_scale": "1", "flow_shift": "8"}, 1),
        ({"scheduler": "few-step", "steps_list": "1000,500"}, 1),
    ],
)
@pytest.mark.parametrize("preset", ["demo", "demo-4step"])
def test_hints_that_are_followed_end_where_nothing_is_wrong(
    flags: dict[str, str], steps: int, preset: str
):
    follow(flags, preset, steps)


@pytest.mark.parametrize(
    "command",
    [("plan",), ("generate", "--dry-run"), ("generate", "--seed", 1), ("plan", "--chunks", 1),
     ("rollout", "--chunks", 1, "--dry-run", "--force")],
)  # fmt: skip
def test_a_plan_and_a_dry_run_warn_as_the_run_does(
    wancli: Wancli, tiny_model: Path, command: tuple[object, ...]
):
    save_file(random_lora()[0], HIGH)
    small = ("--size", "32x32", "--steps", 1, "--scheduler", "unipc", "--guidance-scale", 1)
    frames = () if "--chunks" in command else ("--num-frames", 5)
    name, *flags = command
    result = wancli(name, "a cat", *flags, *small, *frames, "--model", tiny_model, "--lora", HIGH)
    assert result.code == 0, result.err
    text = f"warn:  LoRA {HIGH} was distilled for --scheduler euler, "
    assert result.err.replace("\n", " ").count(text) == 1
