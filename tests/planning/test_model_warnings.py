"""Doubts about a model: a folder without its authors' settings, files of the other expert."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wancli.catalog.local import find_spec
from wancli.catalog.specs import SPECS, ModelSpec
from wancli.config.resolve import Layer, resolve
from wancli.config.settings import Settings
from wancli.planning.model_warnings import (
    distilled_name_warnings,
    length_warnings,
    missing_preset_warnings,
    size_warnings,
    swapped_expert_warnings,
)

DEFAULTS = resolve([], Settings)


def in_folder(name: str, **changes: Any) -> ModelSpec:
    return replace(SPECS[name], name="/models/mine", folder=Path("/models/mine"), **changes)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("wan2.2-t2v-a14b", "`preset wan2.2-t2v-a14b`"),
        ("wan2.2-ti2v-5b", "`preset wan2.2-ti2v-5b`"),
        ("wan2.1-i2v-14b-720p", "`preset wan2.1-i2v-14b-480p` or `preset wan2.1-i2v-14b-720p`"),
    ],
)
def test_a_folder_is_told_the_preset_of_its_kind(name: str, hint: str):
    (warning,) = missing_preset_warnings(in_folder(name), DEFAULTS)
    assert warning.text.startswith("mine has no preset: shift, guidance and negative prompt")
    assert warning.hint == hint


def test_a_folder_with_a_shift_of_its_own_and_one_of_no_known_kind_are_not_warned_of():
    chosen = resolve([Layer("flag", {"sampling": {"flow_shift": 3.0}})], Settings)
    assert missing_preset_warnings(in_folder("wan2.2-t2v-a14b"), chosen) == ()
    assert missing_preset_warnings(in_folder("wan2.2-t2v-a14b", boundary_ratio=0.5), DEFAULTS) == ()
    assert missing_preset_warnings(SPECS["wan2.2-t2v-a14b"], DEFAULTS) == ()


@pytest.mark.parametrize(
    ("model", "frames", "trained"),
    [
        ("wan2.1-t2v-14b", 121, 81),
        ("wan2.1-t2v-14b", 101, 0),
        ("wan2.2-ti2v-5b", 161, 121),
        ("rcm-t2v-14b-720p", 161, 77),
        ("wan2.2-animate-14b", 401, 0),  # by segments
        ("random:wan2.1-t2v-14b", 401, 0),
    ],
)
def test_a_clip_much_longer_than_those_of_the_training_is_warned_of(
    model: str, frames: int, trained: int
):
    chosen = resolve([Layer("flag", {"video": {"num_frames": frames}})], Settings)
    hints = [warning.hint for warning in length_warnings(find_spec(model), chosen)]
    assert [hint.partition(";")[0] for hint in hints] == [f"`num_frames {trained}`"] * bool(trained)


@pytest.mark.parametrize(
    ("model", "size", "better"),
    [
        ("demo", (192, 128), ["`size 96x96`"]),
        ("demo", (128, 96), []),
        ("wan2.1-t2v-1.3b", (720, 1280), ["`size 480x832`"]),
        ("wan2.1-t2v-14b", (720, 1280), []),
        ("wan2.2-t2v-a14b", (1920, 1088), ["`size 1280x720`"]),
        ("random:wan2.1-t2v-1.3b", (1280, 720), []),
    ],
)
def test_a_video_much_larger_than_those_of_the_training_is_warned_of(
    model: str, size: tuple[int, int], better: list[str]
):
    video = dict(zip(("width", "height"), size, strict=True))
    chosen = resolve([Layer("flag", {"video": video})], Settings)
    assert [warning.hint for warning in size_warnings(find_spec(model), chosen)] == better


@pytest.mark.parametrize(
    ("name", "expert", "warned"),
    [
        ("wan2.2_lora_low_noise.safetensors", "high", True),
        ("wan2.2_lora_low_noise.safetensors", "low", False),
        ("Style-HIGH-v1.safetensors", "low", True),
        ("high_quality_LowNoise.safetensors", "high", True),
        ("high_quality_low.safetensors", "low", False),
        ("slow_motion.safetensors", "high", False),
    ],
)
def test_a_file_named_for_the_other_expert_is_warned_of(
    tmp_path: Path, name: str, expert: str, warned: bool
):
    (tmp_path / name).touch()
    machine = {"machine": {"lora": [f"{tmp_path / name}@{expert}=0.5"]}}
    chosen = resolve([Layer("flag", machine)], Settings)
    warnings = swapped_expert_warnings(SPECS["wan2.2-t2v-a14b"], chosen)
    other = {"high": "low", "low": "high"}[expert]
    assert [warning.hint for warning in warnings] == [f"`lora` {name}@{other}"] * warned
    assert swapped_expert_warnings(SPECS["wan2.1-t2v-14b"], chosen) == ()


@pytest.mark.parametrize(
    ("name", "sampling", "warned"),
    [
        ("Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32", {}, True),
        ("Wan21_CausVid_14B_T2V_lora_rank32_v2", {}, True),
        ("Wan2.2-T2V-4steps-lora", {}, True),
        ("Wan2.2-T2V-4steps-lora", {"guidance_scale": 1.0}, False),
        ("Wan2.2-T2V-4steps-lora", {"scheduler": "few-step"}, False),
        ("style_12steps", {}, False),
        ("footsteps", {}, False),
        ("wan2.1_t2v_14b_lora_rank64_lightx2v_4step", {}, False),  # a preset has it: refused
    ],
)
def test_guidance_with_a_file_that_its_name_calls_distilled_is_warned_of(
    tmp_path: Path, name: str, sampling: dict[str, Any], warned: bool
):
    (tmp_path / f"{name}.safetensors").touch()
    tables = {"machine": {"lora": [str(tmp_path / f"{name}.safetensors")]}, "sampling": sampling}
    chosen = resolve([Layer("flag", tables)], Settings)
    warnings = distilled_name_warnings(SPECS["wan2.1-t2v-14b"], chosen)
    hint = "`guidance_scale 1`, and `preset wan2.1-t2v-14b-4step`"
    assert [warning.hint for warning in warnings] == [hint] * warned


def test_each_expert_may_have_guidance_of_its_own(tmp_path: Path):
    (tmp_path / "lightning.safetensors").touch()
    lora = {"machine": {"lora": [f"{tmp_path / 'lightning.safetensors'}@low"]}}
    mixed = {"guidance_scale": 3.5, "guidance_scale_2": 1.0}
    chosen = resolve([Layer("flag", {**lora, "sampling": mixed})], Settings)
    assert distilled_name_warnings(SPECS["wan2.2-t2v-a14b"], chosen) == ()
