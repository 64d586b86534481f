"""`wancli compare`, as a shell calls it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cli.test_bad_input import complaint
from tests.conftest import Wancli
from tests.forked import Run
from wancli.records.record import RunRecord
from wancli.video.ffmpeg import Encoding
from wancli.video.latents import save_latents
from wancli.video.write import VideoWriter

VARIANT = "SSIM (11x11 Gaussian, per channel)"


def record(*, lossless: bool) -> RunRecord:
    request = {"prompt": "x", "seed": 1, "model": "demo", "output": {"lossless": lossless}}
    return RunRecord("1", "ok", "generate", "2026-01-01T00:00:00+00:00", request, "abc")


def film(
    name: str,
    *,
    frames: int = 5,
    size: int = 32,
    at: int = 8,
    jump: int | None = None,
    lossless: bool = True,
) -> str:
    """A square `at` pixels from the left, going right; in video frame `jump` it is 4 px ahead."""
    clip = np.full((frames, size, size, 3), 30, np.uint8)
    for index, frame in enumerate(clip):
        left = at + index + 4 * (index == jump)
        frame[8:16, left : left + 8] = 200
    encoding = Encoding(lossless=lossless, preset="ultrafast")
    with VideoWriter(Path(name), size=(size, size), fps=16, encoding=encoding) as writer:
        writer.write(clip)
        writer.finish({"comment": record(lossless=lossless).embedded()})
    return name


def latents(name: str, *, frames: int = 2, seed: int = 0) -> str:
    values = torch.randn(1, 4, frames, 3, 3, generator=torch.Generator().manual_seed(seed))
    save_latents(values, Path(name), record(lossless=True).as_json())
    return name


def test_two_videos_give_a_table_that_names_the_ssim_variant(wancli: Wancli):
    said = wancli("compare", film("a.mp4"), film("b.mp4", at=9))
    assert said.code == 0
    assert said.err == ""
    heading, ssim, decibels, temporal, largest = said.out.splitlines()
    assert heading.split() == ["metric", "mean", "worst", "video", "frame"]
    assert ssim.startswith(VARIANT)
    assert decibels.startswith("PSNR, dB")
    assert temporal.startswith("temporal difference, levels")
    assert largest.split() == ["largest", "difference,", "levels", "170"]


def test_json_has_the_values_of_the_table(wancli: Wancli):
    one, other = film("a.mp4"), film("b.mp4", at=9)
    told = json.loads(wancli("compare", one, other, "--json").out)
    row = wancli("compare", one, other).out.splitlines()[1].removeprefix(VARIANT).split()
    assert row == [
        f"{told['ssim']['mean']:.6f}", f"{told['ssim']['worst']:.6f}", str(told["ssim"]["frame"])
    ]  # fmt: skip
    assert (told["a"], told["b"], told["kind"]) == ("a.mp4", "b.mp4", "video")
    assert told["schema"] == "wancli.compare/1"
    assert told["variant"] == VARIANT
    assert told["frames"] == 5
    assert told["equal"] is False
    # 16 of 1024 pixels are off by 170
    assert told["psnr_db"]["mean"] == pytest.approx(10 * np.log10(255**2 / (170**2 / 64)))


def test_a_video_is_identical_to_itself(wancli: Wancli):
    said = wancli("compare", film("a.mp4", lossless=False), "a.mp4")
    assert said.code == 0
    assert said.err == ""
    assert "identical" in said.out
    told = json.loads(wancli("compare", "a.mp4", "a.mp4", "--json", "--fail-under-ssim", 1).out)
    assert told["equal"] is True
    assert told["psnr_db"] == {"mean": None, "worst": None, "frame": 0}


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        (False, False, "a.mp4 and b.mp4 are compressed"),
        (True, False, "warn:  b.mp4 is compressed"),
        (True, True, None),
    ],
)
def test_codec_loss_is_warned_of_once(wancli: Wancli, first: bool, second: bool, named: str | None):
    said = wancli(
        "compare", film("a.mp4", lossless=first), film("b.mp4", at=9, lossless=second), "--json"
    )
    assert said.code == 0
    assert json.loads(said.out)["equal"] is False
    assert (named in said.err and "--lossless" in said.err) if named else said.err == ""
    assert said.err.count("codec") == bool(named)


def test_a_threshold_that_is_not_met_is_exit_7_after_the_result(wancli: Wancli):
    one, other = film("a.mp4"), film("b.mp4", at=9)
    worst = json.loads(wancli("compare", one, other, "--json").out)["ssim"]["worst"]
    said = wancli("compare", one, other, "--json", "--fail-under-ssim", worst + 1e-6)
    assert said.code == 7
    assert json.loads(said.out)["ssim"]["worst"] == worst
    assert said.err.startswith(f"error: SSIM {worst:.6f} of video frame")
    assert "\nhint:  " in said.err
    assert wancli("compare", one, other, "--fail-under-ssim", worst - 1e-6).code == 0


def test_the_threshold_applies_to_the_worst_frame(wancli: Wancli):
    one, other = film("a.mp4", frames=9), film("b.mp4", frames=9, jump=3)
    told = json.loads(wancli("compare", one, other, "--json").out)
    between = (told["ssim"]["mean"] + told["ssim"]["worst"]) / 2
    assert told["ssim"]["frame"] == 3
    assert wancli("compare", one, other, "--fail-under-ssim", between).code == 7


def test_latents_are_compared_without_a_codec(wancli: Wancli):
    one, other = latents("a.safetensors"), latents("b.safetensors", seed=1)
    said = wancli("compare", one, other)
    assert (said.code, said.err) == (0, "")
    assert said.out.splitlines()[1].split() == ["equal", "no"]
    told = json.loads(wancli("compare", one, other, "--json").out)
    assert told["kind"] == "latents"
    assert told["relative"] == pytest.approx(2**0.5, rel=0.3)  # two independent samples
    told = json.loads(wancli("compare", one, one, "--json").out)
    assert (told["equal"], told["max_abs"], told["psnr_db"]) == (True, 0, None)


@pytest.mark.parametrize(
    ("frames", "size", "error"), [(6, 32, "5 and 6 video frames"), (5, 48, "32x32 and 48x48")]
)
def test_videos_of_different_sizes_are_rejected(wancli: Wancli, frames: int, size: int, error: str):
    said = wancli("compare", film("a.mp4"), film("b.mp4", frames=frames, size=size))
    assert said.code == 2
    assert error in complaint(said)[0]


def test_latents_of_different_shapes_are_rejected(wancli: Wancli):
    said = wancli("compare", latents("a.safetensors"), latents("b.safetensors", frames=3))
    assert said.code == 2
    assert "1x4x2x3x3 and 1x4x3x3x3" in complaint(said)[0]


def test_a_video_and_latents_are_not_mixed(wancli: Wancli):
    for args in (("a.mp4", "b.safetensors"), ("a.safetensors", "b.mp4")):
        said = wancli("compare", *args)
        assert said.code == 2
        assert "wancli decode" in complaint(said)[1]


@pytest.mark.parametrize("threshold", ["nan", "-0.1", "1.01", "95"])
def test_a_threshold_that_is_not_an_ssim_is_rejected(wancli: Wancli, threshold: str):
    said = wancli("compare", "a.mp4", "b.mp4", f"--fail-under-ssim={threshold}")
    assert said.code == 2
    assert "0.95" in complaint(said)[1]


def test_latents_have_no_ssim_to_fail_under(wancli: Wancli):
    said = wancli("compare", "a.safetensors", "b.safetensors", "--fail-under-ssim", 0.9)
    assert said.code == 2
    assert "no SSIM" in complaint(said)[0]


@pytest.mark.parametrize("name", ["b.mp4", "b.safetensors"])
def test_a_missing_file_suggests_a_similar_one(wancli: Wancli, name: str):
    wrong = name.replace("b.", "bb.")
    (film if name == "b.mp4" else latents)(name)
    for args in ((name, wrong), (wrong, name)):
        said = wancli("compare", *args)
        assert said.code == 4
        error, hint = complaint(said)
        assert f"'{wrong}' not found" in error
        assert f"did you mean '{name}'?" in hint


@pytest.mark.parametrize("name", ["b.mp4", "b.safetensors"])
def test_an_unreadable_file_is_named(wancli: Wancli, name: str):
    Path(name).write_bytes(b"nothing of the kind" * 10)
    said = wancli("compare", name, name)
    assert said.code == 4
    assert name in complaint(said)[0]


@pytest.mark.parametrize("name", ["folder.mp4", "folder.safetensors"])
def test_a_folder_is_no_file_to_compare(wancli: Wancli, name: str):
    Path(name).mkdir()
    said = wancli("compare", name, name)
    assert said.code == 4
    assert name in complaint(said)[0]


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("--help",), 0),
        (("a.mp4", "b.mp4"), 4),
        (("a.mp4", "b.safetensors"), 2),
        (("a.mp4", "b.mp4", "--fail-under-ssim", "9"), 2),
    ],
    ids=str,
)
def test_errors_and_help_load_nothing(
    forked: Run, tmp_path: Path, args: tuple[str, ...], code: int
):
    found, heavy, _, stderr = forked("compare", *args, folder=tmp_path)
    assert (found, heavy) == (code, []), stderr
