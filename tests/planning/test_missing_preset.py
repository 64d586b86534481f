"""A folder of a known kind of model is told which preset has its authors' settings."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wancli.catalog.specs import SPECS, ModelSpec
from wancli.config.resolve import Layer, resolve
from wancli.config.settings import Settings
from wancli.planning.missing_preset import missing_preset_warnings

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
