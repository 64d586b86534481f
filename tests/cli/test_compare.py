"""`wancli compare` as a shell runs it."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

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


def write_video(
    name: str,
    *,
    frames: int = 5,
    size: int = 32,
    at: int = 8,
    jump: int | None = None,
    lossless: bool = True,
) -> str:
    """A square moving right from `at` pixels; in video frame `jump` it is 4 pixels ahead."""
    Path(name).write_bytes(encoded(frames, size, at, jump, lossless))
    return name


@cache
def encoded(frames: int, size: int, at: int, jump: int | None, lossless: bool) -> bytes:
    clip = np.full((frames, size, size, 3), 30, np.uint8)
    for index, frame in enumerate(clip):
        left = at + index + 4 * (index == jump)
        frame[8:16, left : left + 8] = 200
    encoding = Encoding(lossless=lossless, preset="ultrafast")
    with TemporaryDirectory() as folder:
        path = Path(folder, "a.mp4")
        with VideoWriter(path, size=(size, size), fps=16, encoding=encoding) as writer:
            writer.write(clip)
            writer.finish({"comment": record(lossless=lossless).embedded()})
        return path.read_bytes()


def write_latents(name: str, *, frames: int = 2, seed: int = 0) -> str:
    values = torch.randn(1, 4, frames, 3, 3, generator=torch.Generator().manual_seed(seed))
    save_latents(values, Path(name), record(lossless=True).as_json())
    return name


def test_two_videos_give_a_table_that_names_the_ssim_variant(wancli: Wancli):
    result = wancli("compare", write_video("a.mp4"), write_video("b.mp4", at=9))
    assert result.code == 0
    assert result.err == ""
    heading, ssim, decibels, temporal, largest = result.out.splitlines()
    assert heading.split() == ["metric", "mean", "worst", "video", "frame"]
    assert ssim.startswith(VARIANT)
    assert decibels.startswith("PSNR, dB")
    assert temporal.startswith("temporal difference, levels")
    assert largest.split() == ["largest", "difference,", "levels", "170"]


def test_json_has_the_values_of_the_table(wancli: Wancli):
    one, other = write_video("a.mp4"), write_video("b.mp4", at=9)
    comparison = json.loads(wancli("compare", one, other, "--json").out)
    row = wancli("compare", one, other).out.splitlines()[1].removeprefix(VARIANT).split()
    ssim = comparison["ssim"]
    assert row == [f"{ssim['mean']:.6f}", f"{ssim['worst']:.6f}", str(ssim["frame"])]
    assert (comparison["a"], comparison["b"], comparison["kind"]) == ("a.mp4", "b.mp4", "video")
    assert comparison["schema"] == "wancli.compare/1"
    assert comparison["variant"] == VARIANT
    assert comparison["frames"] == 5
    assert comparison["equal"] is False
    # 16 of 1024 pixels are off by 170
    assert comparison["psnr_db"]["mean"] == pytest.approx(10 * np.log10(255**2 / (170**2 / 64)))


def test_a_video_is_identical_to_itself(wancli: Wancli):
    result = wancli("compare", write_video("a.mp4", lossless=False), "a.mp4")
    assert result.code == 0
    assert result.err == ""
    assert "identical" in result.out
    comparison = json.loads(
        wancli("compare", "a.mp4", "a.mp4", "--json", "--fail-under-ssim", 1).out
    )
    assert comparison["equal"] is True
    assert comparison["psnr_db"] == {"mean": None, "worst": None, "frame": 0}


@pytest.mark.parametrize(
    ("first", "second", "warning"),
    [
        (False, False, "a.mp4 and b.mp4 are compressed"),
        (True, False, "warn:  b.mp4 is compressed"),
        (True, True, None),
    ],
)
def test_codec_loss_gives_one_warning(
    wancli: Wancli, first: bool, second: bool, warning: str | None
):
    result = wancli(
        "compare",
        write_video("a.mp4", lossless=first),
        write_video("b.mp4", at=9, lossless=second),
        "--json",
    )
    assert result.code == 0
    assert json.loads(result.out)["equal"] is False
    assert (warning in result.err and "--lossless" in result.err) if warning else result.err == ""
    assert result.err.count("codec") == bool(warning)


def test_missing_the_threshold_exits_with_7_after_the_result(wancli: Wancli):
    one, other = write_video("a.mp4"), write_video("b.mp4", at=9)
    worst = json.loads(wancli("compare", one, other, "--json").out)["ssim"]["worst"]
    result = wancli("compare", one, other, "--json", "--fail-under-ssim", worst + 1e-6)
    assert result.code == 7
    assert json.loads(result.out)["ssim"]["worst"] == worst
    assert result.err.startswith(f"error: SSIM {worst:.6f} of video frame")
    assert "\nhint:  " in result.err
    assert wancli("compare", one, other, "--fail-under-ssim", worst - 1e-6).code == 0


def test_the_threshold_applies_to_the_worst_frame(wancli: Wancli):
    one, other = write_video("a.mp4", frames=9), write_video("b.mp4", frames=9, jump=3)
    comparison = json.loads(wancli("compare", one, other, "--json").out)
    between = (comparison["ssim"]["mean"] + comparison["ssim"]["worst"]) / 2
    assert comparison["ssim"]["frame"] == 3
    assert wancli("compare", one, other, "--fail-under-ssim", between).code == 7


def test_latents_are_compared_without_a_codec(wancli: Wancli):
    one, other = write_latents("a.safetensors"), write_latents("b.safetensors", seed=1)
    result = wancli("compare", one, other)
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[1].split() == ["equal", "no"]
    comparison = json.loads(wancli("compare", one, other, "--json").out)
    assert comparison["kind"] == "latents"
    assert comparison["relative"] == pytest.approx(2**0.5, rel=0.3)  # two independent samples
    comparison = json.loads(wancli("compare", one, one, "--json").out)
    assert (comparison["equal"], comparison["max_abs"], comparison["psnr_db"]) == (True, 0, None)


@pytest.mark.parametrize(
    ("frames", "size", "error"), [(6, 32, "5 and 6 video frames"), (5, 48, "32x32 and 48x48")]
)
def test_videos_of_different_sizes_are_rejected(wancli: Wancli, frames: int, size: int, error: str):
    result = wancli("compare", write_video("a.mp4"), write_video("b.mp4", frames=frames, size=size))
    assert result.code == 2
    assert error in complaint(result)[0]


def test_latents_of_different_shapes_are_rejected(wancli: Wancli):
    result = wancli(
        "compare", write_latents("a.safetensors"), write_latents("b.safetensors", frames=3)
    )
    assert result.code == 2
    assert "1x4x2x3x3 and 1x4x3x3x3" in complaint(result)[0]


def test_a_video_is_not_compared_with_latents(wancli: Wancli):
    for args in (("a.mp4", "b.safetensors"), ("a.safetensors", "b.mp4")):
        result = wancli("compare", *args)
        assert result.code == 2
        assert "wancli decode" in complaint(result)[1]


@pytest.mark.parametrize("threshold", ["nan", "-0.1", "1.01", "95"])
def test_a_threshold_that_is_not_an_ssim_is_rejected(wancli: Wancli, threshold: str):
    result = wancli("compare", "a.mp4", "b.mp4", f"--fail-under-ssim={threshold}")
    assert result.code == 2
    assert "0.95" in complaint(result)[1]


def test_an_ssim_threshold_is_rejected_for_latents(wancli: Wancli):
    result = wancli("compare", "a.safetensors", "b.safetensors", "--fail-under-ssim", 0.9)
    assert result.code == 2
    assert "no SSIM" in complaint(result)[0]


@pytest.mark.parametrize("name", ["b.mp4", "b.safetensors"])
def test_a_missing_file_suggests_a_similar_one(wancli: Wancli, name: str):
    misspelt = name.replace("b.", "bb.")
    (write_video if name == "b.mp4" else write_latents)(name)
    for args in ((name, misspelt), (misspelt, name)):
        result = wancli("compare", *args)
        assert result.code == 4
        error, hint = complaint(result)
        assert f"'{misspelt}' not found" in error
        assert f"did you mean '{name}'?" in hint


@pytest.mark.parametrize("name", ["x.mp4", "x.safetensors", "folder.mp4", "folder.safetensors"])
def test_an_unreadable_file_is_named(wancli: Wancli, name: str):
    if name.startswith("folder"):
        Path(name).mkdir()
    else:
        Path(name).write_bytes(b"nothing of the kind" * 10)
    result = wancli("compare", name, name)
    assert result.code == 4
    assert name in complaint(result)[0]


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
    exit_code, heavy, _, stderr = forked("compare", *args, folder=tmp_path)
    assert (exit_code, heavy) == (code, []), stderr
