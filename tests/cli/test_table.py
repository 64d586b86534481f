"""Tables at any width: names stay whole, and everything is there."""

from collections.abc import Sequence

import pytest
from rich.cells import cell_len

from tests.conftest import Wancli
from wancli.catalog.specs import SPECS
from wancli.cli.table import table_lines
from wancli.config.presets import list_presets

NAMES = ("wan2.1-t2v-1.3b-cached-fast", "demo")
TEXT = "a description of some length that may be wrapped at its spaces, as often as needed"


def lines(
    *columns: str, rows: Sequence[tuple[str, ...]], width: int, right: tuple[str, ...] = ()
) -> list[str]:
    return list(table_lines(columns, rows, right=right, width=width))


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_name_is_split_and_no_word_is_lost(width: int):
    rows = [(name, "text-to-video, video-to-video", "12.3 GiB", TEXT) for name in NAMES]
    table = lines("name", "task", "size", "text", rows=rows, width=width, right=("size",))
    assert max(map(cell_len, table)) <= width
    for name in NAMES:
        assert sum(name in line for line in table) == 1
    words = " ".join(table).split()
    for word in TEXT.split():
        assert words.count(word) == 2 * TEXT.split().count(word)


def test_prose_that_does_not_fit_goes_below_its_row():
    rows = [(name, "x" * 30, TEXT) for name in NAMES]
    table = lines("name", "repo", "text", rows=rows, width=70)
    assert table[0].split() == ["name", "repo"]
    assert table[2].startswith("    a description of some length")


def test_numbers_that_do_not_fit_go_below_their_name():
    numbers = ("1.25 s", "2.00x", "0.9876", "31.2 dB")
    columns = ("variant", "denoise", "speed-up", "SSIM", "PSNR")
    table = lines(*columns, rows=[(NAMES[0], *numbers)], width=50, right=columns[1:])
    assert table == [
        "variant",
        "    denoise  speed-up    SSIM     PSNR",
        NAMES[0],
        "     1.25 s     2.00x  0.9876  31.2 dB",
    ]


def test_columns_of_wide_characters_are_aligned():
    table = lines("a", "b", rows=[("赤い円", "1"), ("x", "2")], width=80)
    assert table == ["a       b", "赤い円  1", "x       2"]


def test_wrapped_cells_keep_their_indent():
    rows = [("  " + NAMES[0], f"  {TEXT}")]
    table = lines("", "", rows=rows, width=60)
    assert table[0].startswith(f"  {NAMES[0]}    a description")
    assert {len(line) - len(line.lstrip()) for line in table[1:]} == {len(NAMES[0]) + 6}


def test_blank_headers_take_no_line():
    assert lines("", "", rows=[("a", "b")], width=80) == ["a  b"]


@pytest.mark.parametrize(
    "command",
    [
        ("preset", "list"),
        ("model", "list"),
        ("preset", "show", "wan2.1-t2v-1.3b-cached-fast"),
        ("plan", "--model", "wan2.2-t2v-a14b", "--gpu", "rtxpro6000"),
        ("generate", "x", "--model", "wan2.2-t2v-a14b", "--force", "--dry-run"),
        ("rollout", "x", "--dry-run"),
    ],
)
def test_what_is_printed_fits_80_columns_with_whole_names(
    wancli: Wancli, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
):
    monkeypatch.setenv("COLUMNS", "80")
    out = wancli(*command).out
    assert max(map(cell_len, out.splitlines())) <= 80
    assert not {"None", "True", "False", "[]", "()"} & set(out.split())
    names = {"preset": [p.preset.name for p in list_presets()], "model": list(SPECS)}
    for name in names[command[0]] if command[-1] == "list" else ():
        assert any(line.startswith(f"{name} ") for line in out.splitlines())
