"""`wancli preview`: the sheets and animations it writes, and the requests it rejects."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from PIL import Image, ImageSequence

from tests.cli.test_bad_input import complaint
from tests.conftest import Wancli
from wancli.records.ledger import create_ledger
from wancli.records.ledger_file import LedgerJob, LedgerSettings
from wancli.records.ledger_worker import LedgerWorker
from wancli.video.ffmpeg import Encoding
from wancli.video.write import VideoWriter

LEVELS = tuple(range(0, 250, 10))  # of gray, one per video frame


def gray_video(
    path: Path, levels: Sequence[int] = LEVELS, *, size: tuple[int, int] = (64, 32), fps: int = 16
) -> Path:
    path.write_bytes(encoded(tuple(levels), size, fps))
    return path


@cache
def encoded(levels: tuple[int, ...], size: tuple[int, int], fps: int) -> bytes:
    with TemporaryDirectory() as folder:
        path, encoding = Path(folder, "a.mp4"), Encoding(lossless=True)
        with VideoWriter(path, size=size, fps=fps, encoding=encoding) as writer:
            for level in levels:
                writer.write(np.full((1, size[1], size[0], 3), level, np.uint8))
            writer.finish({})
        return path.read_bytes()


def test_a_sheet_shows_frames_from_the_first_to_the_last(wancli: Wancli):
    gray_video(Path("a.mp4"))
    result = wancli("preview", "a.mp4", "--rows", 2, "--columns", 3, "--width", 64)
    assert (result.code, result.out) == (0, "a.png\n"), result.err
    sheet = np.asarray(Image.open("a.png").convert("RGB"))
    assert sheet.shape == (2 * (32 + 14 + 8) + 8, 3 * (64 + 8) + 8, 3)
    middles = [
        sheet[8 + 16 + 54 * row, 8 + 32 + 72 * column] for row in (0, 1) for column in range(3)
    ]
    assert [int(middle[0]) for middle in middles] == [0, 50, 100, 140, 190, 240]


def test_each_frame_has_its_number_and_time(wancli: Wancli):
    gray_video(Path("a.mp4"))
    gray_video(Path("b.mp4"), LEVELS[:1])
    wancli("preview", "a.mp4", "b.mp4", "--rows", 1, "--columns", 1, "--width", 64)
    one, other = (np.asarray(Image.open(name).convert("RGB")) for name in ("a.png", "b.png"))
    paper = np.array([0x1B, 0x1B, 0x1F])
    assert (one[8 + 32 : -8] != paper).any()  # ink
    assert np.array_equal(one, other)  # both show frame 0 at 0.00 s
    wancli("preview", "a.mp4", "--rows", 1, "--columns", 2, "--width", 64, "--overwrite")
    both = np.asarray(Image.open("a.png").convert("RGB"))[8 + 32 : -8]
    assert not np.array_equal(both[:, 8:72], both[:, 80:144])


def test_several_videos_share_a_named_sheet(wancli: Wancli):
    gray_video(Path("a.mp4"), [40] * 5)
    gray_video(Path("b.mp4"), [200] * 5, size=(32, 32))
    result = wancli("preview", "a.mp4", "b.mp4", "--sheet", "both.png", "--width", 64, "--json")
    summary = json.loads(result.out)
    assert (summary["kind"], summary["videos"], summary["frames"]) == (
        "sheet",
        ["a.mp4", "b.mp4"],
        10,
    )
    sheet = Image.open("both.png").convert("RGB")
    assert sheet.size == (summary["width"], summary["height"])
    shown = {level for level in (40, 200) if (np.asarray(sheet) == level).all(-1).any()}
    assert shown == {40, 200}
    assert not Path("a.png").exists()


def test_a_sheet_of_few_frames_has_no_empty_cells(wancli: Wancli):
    gray_video(Path("a.mp4"), [10, 20])
    summary = json.loads(wancli("preview", "a.mp4", "--width", 64, "--json").out)
    assert (summary["frames"], summary["width"]) == (2, 2 * 72 + 8)


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_an_animation_loops_over_all_frames_at_the_video_speed(wancli: Wancli, kind: str):
    gray_video(Path("a.mp4"))
    result = wancli("preview", "a.mp4", f"--{kind}", f"a.{kind}")
    assert (result.code, result.out) == (0, f"a.{kind}\n"), result.err
    assert not Path("a.png").exists()
    with Image.open(f"a.{kind}") as animation:
        assert animation.size == (64, 32)
        assert animation.info["loop"] == 0
        shown, milliseconds = [], 0.0
        for frame in ImageSequence.Iterator(animation):
            shown.append(int(np.asarray(frame.convert("RGB"))[16, 32, 0]))
            milliseconds += frame.info["duration"]
    assert len(shown) == len(LEVELS)
    assert np.abs(np.array(shown) - LEVELS).max() <= 3
    assert milliseconds == pytest.approx(1000 * len(LEVELS) / 16, abs=10)


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_an_animation_can_be_smaller_and_have_fewer_frames(wancli: Wancli, kind: str):
    gray_video(Path("a.mp4"), LEVELS[:24])
    arguments = ("--width", 32, "--fps", 8, "--json", f"--{kind}", f"a.{kind}")
    summary = json.loads(wancli("preview", "a.mp4", *arguments).out)
    assert (summary["width"], summary["height"], summary["frames"]) == (32, 16, 12)
    with Image.open(f"a.{kind}") as animation:
        animation.seek(11)
        assert abs(int(np.asarray(animation.convert("RGB"))[8, 8, 0]) - LEVELS[22]) <= 3


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_an_animation_can_be_a_single_frame(wancli: Wancli, kind: str):
    gray_video(Path("a.mp4"), [200])
    result = wancli("preview", "a.mp4", f"--{kind}", f"a.{kind}")
    assert result.code == 0, result.err
    with Image.open(f"a.{kind}") as picture:
        assert abs(int(np.asarray(picture.convert("RGB"))[16, 32, 0]) - 200) <= 3


def test_one_call_writes_a_sheet_and_animations(wancli: Wancli):
    gray_video(Path("a.mp4"))
    arguments = ("--sheet", "s.png", "--gif", "g.gif", "--webp", "w.webp")
    assert wancli("preview", "a.mp4", *arguments).out == "s.png\ng.gif\nw.webp\n"


def test_a_picture_of_the_same_video_is_replaced_unless_it_was_modified(wancli: Wancli):
    gray_video(Path("a.mp4"), [40] * 5)
    arguments = ("a.mp4", "--sheet", "a.png", "--gif", "a.gif", "--webp", "a.webp")
    assert wancli("preview", *arguments).code == 0
    before = Path("a.png").read_bytes()
    Path("a.mp4").unlink()
    gray_video(Path("a.mp4"), [200] * 5)  # rendered again
    assert wancli("preview", *arguments).code == 0
    assert Path("a.png").read_bytes() != before
    Path("b.mp4").write_bytes(Path("a.mp4").read_bytes())
    result = wancli("preview", "b.mp4", "--sheet", "a.png")
    assert (result.code, "a.png exists" in result.err) == (2, True)
    for name in ("a.png", "a.gif", "a.webp"):
        mine = Path(name).read_bytes() + b"mine"
        Path(name).write_bytes(mine)
        result = wancli("preview", *arguments)
        assert (result.code, f"{name} exists" in result.err) == (2, True)
        assert Path(name).read_bytes() == mine
        Path(name).unlink()


def test_frames_are_decoded_one_at_a_time(tmp_path: Path):
    import tracemalloc

    from wancli.video.sheet import SheetLayout, draw_sheet

    long = gray_video(tmp_path / "long.mp4", [0] * 60, size=(256, 256))
    video_bytes = 60 * 256 * 256 * 3
    draw_sheet([long], SheetLayout(1, 1, 32))
    tracemalloc.start()
    draw_sheet([long], SheetLayout(3, 4, 32))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < video_bytes / 10


@pytest.mark.parametrize(
    ("arguments", "code", "error", "hint"),
    [
        (("none.mp4",), 4, "video 'none.mp4' not found", ""),
        (("a.mp4", "--sheet", "a.jpg"), 2, "does not end in .png", "a.png"),
        (("a.mp4", "--gif", "a.mp4"), 2, "does not end in .gif", "a.gif"),
        (("a.mp4", "-o", "a.gif"), 2, "does not end in .png", "--gif a.gif"),
        (("a.mp4", "--webp", "a"), 2, "does not end in .webp", "a.webp"),
        (("a.mp4", "a.mp4", "--gif", "a.gif"), 2, "2 videos cannot share", "--sheet"),
        (("a.mp4", "a.mov"), 2, "two videos of the same name", "--sheet"),
        (("a.mp4", "--fps", 8), 2, "--fps is for animations", "--gif"),
        (("a.mp4", "--gif", "a.gif", "--fps", 30), 2, "a.mp4 has 16 frames", "--fps 16"),
        (("a.mp4", "--gif", "a.gif", "--fps", 0), 2, "--fps 0", "--fps 16"),
        (("fast.mp4", "--gif", "a.gif", "--fps", 60), 2, "a GIF shows at most 50", "--fps 50"),
        (("a.mp4", "--rows", 0), 2, "'--rows'", "wancli preview --help"),
        (("a.mp4", "--gif", "a.gif", "--rows", 2), 2, "for contact sheets", "--sheet NAME.png"),
        (("a.mp4", "--grid", "-o", "a.png", "--columns", 2), 2, "for contact sheets", "--grid"),
        (("a.mp4", "--sheet", "taken.png"), 2, "taken.png exists", "--overwrite"),
        (("broken.mp4",), 4, "broken.mp4", ""),
        (("a.mp4", "--sheet", "file/a.png"), 6, "cannot write file/a.png", ""),
    ],
)  # fmt: skip
def test_invalid_requests_are_rejected(
    wancli: Wancli, arguments: tuple[object, ...], code: int, error: str, hint: str
):
    gray_video(Path("a.mp4"), LEVELS[:3])
    if "fast.mp4" in arguments:
        gray_video(Path("fast.mp4"), LEVELS[:3], fps=60)
    for name in ("taken.png", "file", "a.mov"):
        Path(name).write_text("mine")
    Path("broken.mp4").write_bytes(b"no video")
    result = wancli("preview", *arguments)
    message, advice = complaint(result)
    assert result.code == code, result.err
    assert error in message
    assert hint in advice
    assert Path("taken.png").read_text() == "mine"


def test_a_gif_that_does_not_fit_in_memory_is_rejected(tmp_path: Path):
    from wancli.errors import UsageError
    from wancli.video.sheet import draw_animation

    path = gray_video(tmp_path / "a.mp4")
    with pytest.raises(UsageError, match=r"a GIF of 25 frames of 9000x4500") as raised:
        draw_animation(path, gif=True, width=9000, fps=None)
    assert "`webp`" in raised.value.hint


def test_nothing_is_written_if_one_output_is_rejected(wancli: Wancli, tmp_path: Path):
    gray_video(Path("a.mp4"))
    whole = Path("a.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(whole[: len(whole) // 2])
    for arguments, code in (
        (("a.mp4", "b.mp4"), 4),
        (("a.mp4", "--sheet", "s.png", "--gif", "a.gif", "--fps", "99"), 2),
        (("a.mp4", "--webp", "a.webp", "--fps", "1e-9"), 2),
        (("a.mp4", "."), 4),
    ):
        result = wancli("preview", *arguments)
        assert (result.code, result.out) == (code, ""), result.err
        assert "unexpected" not in result.err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


def test_a_grid_takes_a_ledger_and_needs_a_name(wancli: Wancli, tmp_path: Path):
    job = LedgerJob(1, 0, "a", 1, str(tmp_path / "a.mp4"))
    settings = LedgerSettings(0, "generate", {})
    with create_ledger(tmp_path / "b.ledger", "d", [settings], [job], version="1") as ledger:
        assert wancli("preview", "b.ledger", "--grid", "--sheet", "x.png").code == 4  # none is done
        worker = LedgerWorker(ledger)
        claimed = worker.claim()
        assert claimed
        gray_video(claimed.output)
        worker.done(claimed, {})
    result = wancli("preview", ".", "--grid", "--sheet", "x.png", "--json")
    assert json.loads(result.out)["frames"] == 1
    assert wancli("preview", ".", "--grid").code == 2
    assert wancli("preview", ".", "--grid", "--sheet", "y.png", "--gif", "y.gif").code == 2
