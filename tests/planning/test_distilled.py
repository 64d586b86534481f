import pytest

from wancli.config.settings import Machine, Sampling, Settings
from wancli.errors import PlanError
from wancli.planning.distilled import check_distilled, warn_of_distilled

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
    warnings: list[tuple[str, str]] = []

    def warn(text: str, *, hint: str) -> None:
        warnings.append((text, hint))

    for lora, changes in ((HIGH, {}), ("mine.safetensors", {"flow_shift": 8.0})):
        warn_of_distilled(settings(lora, **changes), warn)
    assert warnings == []
    warn_of_distilled(settings(HIGH, scheduler="unipc", flow_shift=8.0), warn)
    text = f"LoRA {HIGH} was distilled for `scheduler euler`, `flow_shift 5.0`."
    assert warnings == [(text, "`preset wan2.2-t2v-a14b-4step`")]
