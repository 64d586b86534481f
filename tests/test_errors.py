"""Hints suggest similar names, or nothing."""

from pathlib import Path

import pytest

from wancli.catalog.specs import SPECS
from wancli.errors import closest, missing


@pytest.mark.parametrize(
    ("typed", "there", "expected"),
    [
        ("cat.pgn", "cat.png", True),
        ("cta.png", "cat.png", True),
        ("Cat.PNG", "cat.png", True),
        ("clip1.mp4", "clip.mp4", True),
        ("a.mp4", "b.mp4", False),  # alike only in their ending
        ("none.mp4", "x.mp4", False),
        ("dog.png", "cat.png", False),
        ("red.mp4", "red.json", False),
    ],
)
def test_only_a_file_of_a_similar_name_is_suggested(
    tmp_path: Path, typed: str, there: str, expected: bool
):
    (tmp_path / there).touch()
    meant = f"did you mean '{tmp_path / there}'?"
    assert missing("file", tmp_path / typed).hint == (meant if expected else "check the path")


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("dmeo", "demo"),
        ("wan-2.1-t2v-1.3b", "wan2.1-t2v-1.3b"),
        ("Wan2.1-T2V-14B", "wan2.1-t2v-14b"),
        ("self-forcng", "self-forcing"),
        ("my-model", None),
        ("mode", None),
        ("flux", None),
        ("sdxl-turbo", None),
    ],
)
def test_only_a_model_of_a_similar_name_is_suggested(typed: str, expected: str | None):
    assert closest(typed, SPECS) == expected
