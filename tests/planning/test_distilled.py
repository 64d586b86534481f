from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.conftest import Wancli
from tests.models.test_lora import random_lora
from wancli.config.settings import Machine, Sampling, Settings
from wancli.errors import PlanError, PlanWarning
from wancli.planning.distilled import check_distilled, distilled_warnings

HIGH = "wan2.2_t2v_A14b_high_noise_lora_rank64_lightx2v_4step_1217.safetensors"
LOW = HIGH.replace("high", "low")


def settings(lora: str, **sampling: object) -> Settings:
    trained = {"scheduler": "euler", "steps_list": "1000,750,500,250", "flow_shift": 5.0}
    return Settings(
        sampling=Sampling(**(trained | {"guidance_scale": 1.0} | sampling)),
        machine=Machine(lora=(lora,)),
    )


@pytest.mark.parametrize("name", [HIGH, f"a/b/{HIGH}@high=0.5", f"some/repo:{HIGH}@high"])
def test_guidance_is_refused_with_a_distilled_lora_by_the_name_of_its_file(name: str):
    with pytest.raises(PlanError, match="without guidance; `guidance_scale` is 3.5") as error:
        check_distilled(settings(name, guidance_scale=3.5))
    assert error.value.hint == "`guidance_scale 1`, or `preset wan2.2-t2v-a14b-4step`"
    check_distilled(settings(name))


def test_each_expert_has_guidance_of_its_own():
    check_distilled(settings(f"{LOW}@low", guidance_scale=3.5, guidance_scale_2=1.0))
    with pytest.raises(PlanError, match="`guidance_scale_2` is 2"):
        check_distilled(settings(f"{LOW}@low", guidance_scale=3.5, guidance_scale_2=2.0))


def test_other_timesteps_than_those_of_training_are_warned_of():
    for lora, changes in ((HIGH, {}), ("mine.safetensors", {"flow_shift": 8.0})):
        assert distilled_warnings(settings(lora, **changes)) == ()
    text = f"LoRA {HIGH} was distilled for `scheduler euler`, `flow_shift 5.0`."
    assert distilled_warnings(settings(HIGH, scheduler="unipc", flow_shift=8.0)) == (
        PlanWarning(text, "`preset wan2.2-t2v-a14b-4step`"),
    )


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
