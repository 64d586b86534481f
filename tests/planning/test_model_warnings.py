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
    length_warnings,
    missing_preset_warnings,
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
