"""A sheet of a sweep: what makes rows and columns, and that each video stands where it belongs."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFont

from tests.cli.test_preview import gray_video
from wancli.video import lettering
from wancli.video.lettering import choose_font, with_letters_of
from wancli.video.sweep import SweepGrid, arrange, draw_sweep


def record(
    prompt: str = "a", seed: int = 1, model: str = "demo", **sampling: Any
) -> dict[str, Any]:
    sources = {f"sampling.{name}": "flag" for name in sampling}
    values = {"steps": 20, "guidance_scale": 5.0} | sampling
    request = {"prompt": prompt, "seed": seed, "model": model, "sampling": values}
    return {"request": {**request, "sources": sources}}


def arranged(*records: dict[str, Any] | None) -> tuple[Any, Any, dict[tuple[int, int], str]]:
    grid = arrange({Path(str(number)): one for number, one in enumerate(records)})
    cells = {place: video.name for place, video in grid.cells.items()}
    return list(grid.rows), list(grid.columns), cells


@pytest.mark.parametrize(
    ("records", "rows", "columns"),
    [
        ([record("a"), record("b")], ["a", "b"], [""]),
        ([record("a", s) for s in (1, 2)], ["seed 1", "seed 2"], [""]),
        ([record(p, s) for p in "ab" for s in (2, 1)], ["a", "b"], ["seed 1", "seed 2"]),
        ([record(steps=n) for n in (10, 2, 9)], [""], ["steps 2", "steps 9", "steps 10"]),
        (
            [record(p, s, steps=n) for p in "ab" for s in (1, 2) for n in (2, 4)],
            ["a\nseed 1", "a\nseed 2", "b\nseed 1", "b\nseed 2"],
            ["steps 2", "steps 4"],
        ),
        (
            [record(steps=n, guidance_scale=g) for n in (2, 4) for g in (1.0, 3.0)],
            ["steps 2", "steps 4"],
            ["guidance scale 1.0", "guidance scale 3.0"],
        ),
    ],
)
def test_prompts_and_seeds_make_rows_and_settings_make_columns(records, rows, columns):
    shown = arranged(*records)
    assert shown[:2] == (rows, columns)
    assert len(shown[2]) == len(records)


def test_what_follows_from_another_setting_is_no_column_of_its_own():
    two = [record(model="demo", steps=20), record(model="other", steps=4)]
    assert arranged(*two)[1] == ["model demo", "model other"]


def test_a_video_without_a_record_and_a_second_of_the_same_are_known_by_their_names():
    _, columns, cells = arranged(record(), record(), None)
    assert [text.split("\n")[-1] for text in columns] == ["0", "1", "2"]
    assert len(cells) == 3


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a red circle", "a red circle"),
        ("ein Mädchen …", "ein Madchen …"),
        ("a 猫猫, running", "a ?, running"),
        ("一只猫\nseed 1", "row 1\nseed 1"),
        ("", ""),
    ],
)
def test_a_label_has_no_letters_that_its_font_lacks(
    monkeypatch: pytest.MonkeyPatch, text: str, shown: str
):
    monkeypatch.setattr(lettering, "SYSTEM_FONTS", ("none.ttf",))
    font = choose_font([text], 13)
    assert with_letters_of(font, text, other="row 1") == shown


def test_a_font_of_the_system_is_taken_where_it_has_more_of_the_letters(
    monkeypatch: pytest.MonkeyPatch,
):
    own, other = ImageFont.load_default(13), ImageFont.load_default(14)
    lacking = {own: 2, other: 1}
    monkeypatch.setattr(lettering, "_fonts", lambda _size: iter((own, other)))
    monkeypatch.setattr(lettering, "missing_letters", lambda font, _: range(lacking[font]))
    assert choose_font(["я猫"], 13) is other


def test_each_video_stands_in_its_cell_beside_its_labels(tmp_path: Path):
    levels = {(0, 0): 40, (0, 1): 90, (1, 1): 200}
    cells = {
        place: gray_video(tmp_path / f"{level}.mp4", [0, level, 0])
        for place, level in levels.items()
    }
    grid = SweepGrid(["a " * 200, "b"], ["steps 1", "s" * 200], cells)
    picture = draw_sweep(grid, width=64)
    sheet = np.asarray(Image.open(io.BytesIO(picture.content)).convert("RGB"))
    assert sheet.shape[:2] == (picture.height, picture.width)
    seen = {
        place: sheet[-24 - 40 * (1 - place[0]), -40 - 72 * (1 - place[1]), 0] for place in levels
    }
    assert seen == levels
    label = sheet[-80:-44, 8:178]
    assert (label > 128).any()  # ink
    assert not (sheet[:, 179:185] > 128).any()  # labels end before the pictures
