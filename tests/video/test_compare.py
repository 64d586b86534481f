import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from wancli.errors import UsageError
from wancli.video.compare import (
    CHUNK,
    QualityMeter,
    compare_files,
    compare_latents,
    compare_videos,
    psnr,
)
from wancli.video.ffmpeg import Encoding
from wancli.video.read import read_frames
from wancli.video.write import VideoWriter


def clip(frames: int, height: int = 24, width: int = 32, *, seed: int = 0) -> np.ndarray:
    """A smooth pattern that moves, with some noise, uint8 [T, H, W, 3]."""
    t, y, x, c = np.meshgrid(*map(np.arange, (frames, height, width, 3)), indexing="ij")
    wave = 120 + 80 * np.sin((x + 2 * t) / 5 + c) * np.cos(y / 7 - c)
    noise = np.random.default_rng(seed).normal(0, 4, wave.shape)
    return (wave + noise).clip(0, 255).astype(np.uint8)


def reference_ssim(one: np.ndarray, other: np.ndarray) -> float:
    """SSIM (Wang et al. 2004) of two frames [H, W, 3], window by window, in float64."""
    line = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarities = []
    for channel in range(3):
        a, b = one[..., channel].astype(float), other[..., channel].astype(float)
        for top in range(a.shape[0] - 10):
            for left in range(a.shape[1] - 10):
                p, q = (f[top : top + 11, left : left + 11] for f in (a, b))
                mean_p, mean_q = (window * p).sum(), (window * q).sum()
                var_p = (window * (p - mean_p) ** 2).sum()
                var_q = (window * (q - mean_q) ** 2).sum()
                both = (window * (p - mean_p) * (q - mean_q)).sum()
                luminance = (2 * mean_p * mean_q + c1) / (mean_p**2 + mean_q**2 + c1)
                similarities.append(luminance * (2 * both + c2) / (var_p + var_q + c2))
    return float(np.mean(similarities))


def test_ssim_matches_a_float64_reference_frame_by_frame():
    one, other = clip(3), clip(3, seed=1)
    other[1] = np.roll(other[1], 3, 1)
    expected = [reference_ssim(a, b) for a, b in zip(one, other, strict=True)]
    quality = compare_videos(one, other)
    error = abs(quality.ssim.mean - np.mean(expected))
    assert error < 1e-5, f"off by {error:.1e}"
    assert quality.ssim.worst == pytest.approx(expected[1], abs=1e-5)
    assert quality.ssim.frame == 1
    assert quality.ssim.worst < 0.8 < quality.ssim.mean < 0.95


def test_psnr_pools_the_error_of_all_frames_before_the_logarithm():
    one = np.full((4, 16, 16, 3), 100, np.uint8)
    other = one.copy()
    other[2] += 10  # an error of 100 in one frame of four
    quality = compare_videos(one, other)
    assert quality.mse.mean == 25
    assert quality.psnr_db == pytest.approx(20 * math.log10(255 / 5))
    worst = pytest.approx(28.1308, abs=1e-4)
    assert quality.as_json()["psnr_db"] == {"mean": quality.psnr_db, "worst": worst, "frame": 2}
    assert quality.max_levels == 10


def test_the_largest_difference_is_over_all_chunks():
    other = clip(9).astype(int)
    other[0, 0, 0, 0] += 30 if other[0, 0, 0, 0] < 128 else -30
    other[8, 0, 0, 0] += 2 if other[8, 0, 0, 0] < 128 else -2
    assert compare_videos(clip(9), other.astype(np.uint8)).max_levels == 30


@pytest.mark.parametrize("darker", [True, False])
def test_a_difference_counts_in_both_directions(darker: bool):
    one, other = np.full((1, 11, 11, 3), 200, np.uint8), np.full((1, 11, 11, 3), 5, np.uint8)
    quality = compare_videos(one, other) if darker else compare_videos(other, one)
    assert quality.max_levels == 195


def test_flicker_shows_in_the_temporal_difference_but_hardly_in_ssim():
    one = clip(8)
    other = one.astype(float)
    other[1::2] *= 1.02  # every other frame 2 % brighter
    flickering = compare_videos(one, other.clip(0, 255).astype(np.uint8))
    constant = compare_videos(one, (one * 1.02).clip(0, 255).astype(np.uint8))
    assert flickering.ssim.worst > 0.99
    assert flickering.temporal_levels
    assert constant.temporal_levels
    assert flickering.temporal_levels.mean > 1.5 > 1 > constant.temporal_levels.mean


def test_a_flash_is_reported_where_it_starts():
    one, other = clip(9), clip(9)
    other[6] = other[6] // 2
    quality = compare_videos(one, other)
    assert quality.temporal_levels
    assert quality.temporal_levels.frame == 6
    assert quality.ssim.frame == quality.mse.frame == 6
    change = (one[6].astype(float) - other[6]).mean()
    assert quality.temporal_levels.worst == pytest.approx(change)
    assert quality.temporal_levels.mean == pytest.approx(2 * change / 8)


def test_measuring_in_chunks_equals_measuring_the_whole():
    one, other = clip(11), clip(11, seed=1)
    meter = QualityMeter()
    for first, last in ((0, 1), (1, 4), (4, 4), (4, 9), (9, 11)):
        meter.add(one[first:last], other[first:last])
    assert meter.quality() == compare_videos(one, other)


def test_files_are_compared_in_chunks_like_their_frames(tmp_path: Path):
    paths = [tmp_path / "one.mp4", tmp_path / "other.mp4"]
    for seed, path in enumerate(paths):
        with VideoWriter(
            path, size=(32, 24), fps=16, encoding=Encoding(preset="ultrafast")
        ) as file:
            file.write(clip(2 * CHUNK + 1, seed=seed))
            file.finish({})
    whole = compare_videos(*(read_frames(path) for path in paths))
    assert compare_files(*paths) == whole
    assert whole.frames == 2 * CHUNK + 1


def test_tensors_are_compared_like_arrays():
    one, other = clip(5), clip(5, seed=1)
    tensors = compare_videos(torch.from_numpy(one), torch.from_numpy(other))
    assert tensors == compare_videos(one, other)


def test_equal_videos_are_reported_as_equal():
    quality = compare_videos(clip(5), clip(5))
    assert quality.equal
    assert quality.ssim.mean == quality.ssim.worst == 1
    assert quality.psnr_db is None
    assert quality.max_levels == 0


def test_one_level_of_one_pixel_is_a_difference():
    other = clip(5)
    other[4, 3, 2, 1] += 1
    quality = compare_videos(clip(5), other)
    assert not quality.equal
    assert quality.psnr_db


def test_a_single_frame_has_no_temporal_difference():
    assert compare_videos(clip(1), clip(1, seed=1)).temporal_levels is None


@pytest.mark.parametrize("other", [clip(5), clip(5, seed=1)], ids=["equal", "other"])
def test_quality_is_strict_json(other: np.ndarray):
    quality = compare_videos(clip(5), other)
    values = json.loads(json.dumps(quality.as_json(), allow_nan=False))
    assert set(values) == {field.name for field in dataclasses.fields(quality)} | {"psnr_db"}
    assert set(values["ssim"]) == {"mean", "worst", "frame"}


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (clip(3), clip(4), "have 3 and 4 video frames"),
        (clip(3), clip(3, 32, 24), "are 32x24 and 24x32"),
        (clip(3, 10, 32), clip(3, 10, 32), "are 32x10: SSIM needs 11 pixels per side"),
        (clip(0), clip(0), "no video frames"),
    ],
    ids=["length", "size", "small", "empty"],
)
def test_incomparable_videos_are_rejected_with_both_sizes(
    one: np.ndarray, other: np.ndarray, message: str
):
    with pytest.raises(UsageError, match=message) as caught:
        compare_videos(one, other)
    assert caught.value.hint


def test_frames_that_are_not_uint8_are_rejected():
    levels, shares = torch.from_numpy(clip(2)), torch.from_numpy(clip(2)) / 255
    for one, other in ((levels, shares), (shares, levels), (shares, shares)):
        with pytest.raises(TypeError, match="uint8"):
            compare_videos(one, other)


def test_latent_measures_match_known_values():
    one = torch.zeros(1, 2, 1, 2, 2)
    one[0, 0, 0, 0, 0], one[0, 1, 0, 1, 1] = 3, -1  # norm sqrt(10), range 4
    other = one.clone()
    other[0, 0, 0, 1, 0] = -0.5
    quality = compare_latents(one, other)
    assert quality.max_abs == 0.5
    assert quality.relative == pytest.approx(0.5 / math.sqrt(10))
    assert quality.psnr_db == pytest.approx(psnr(0.25 / 8, peak=4))
    assert not quality.equal


def test_equal_latents_are_reported_as_equal():
    latents = torch.randn(1, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    quality = compare_latents(latents, latents.clone())
    assert (quality.max_abs, quality.relative, quality.psnr_db, quality.equal) == (0, 0, None, True)


def test_zero_latents_do_not_divide_by_zero():
    quality = compare_latents(torch.zeros(1, 1, 1, 2, 2), torch.ones(1, 1, 1, 2, 2))
    assert (quality.max_abs, quality.relative, quality.psnr_db) == (1, None, None)
    json.dumps(quality.as_json(), allow_nan=False)


def test_latents_of_different_shapes_are_rejected_with_both_shapes():
    with pytest.raises(UsageError, match="1x4x2x3x3 and 1x4x3x3x3"):
        compare_latents(torch.zeros(1, 4, 2, 3, 3), torch.zeros(1, 4, 3, 3, 3))
