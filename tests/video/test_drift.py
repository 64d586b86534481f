import json
import math
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from wancli.video.drift import MEASURES, DriftMeter, _Series, _trend
from wancli.video.measures import change, frame_statistics, median_slope

FPS = 16
CHUNK = 12  # video frames
FRAME_MEASURES = MEASURES[:7]  # those of a single video frame

Clip = NDArray[np.uint8]


def texture(side: int = 48) -> NDArray[np.float64]:
    """Coloured waves that wrap around the edges, [H, W, 3], 40 to 120."""
    y, x = np.mgrid[0:side, 0:side] * 2 * math.pi / side
    waves = (np.sin(x + 2 * y), np.cos(2 * x - y), np.sin(3 * x) * np.cos(y))
    return 80 + 40 * np.stack(waves, -1)


def moving(count: int, *, side: int = 48) -> Clip:
    """The texture, moving one pixel right per video frame, so that all changes are equal."""
    still = texture(side).round().astype(np.uint8)
    return np.stack([np.roll(still, shift, 1) for shift in range(count)])


def noise(spread: float = 1.0) -> NDArray[np.float64]:
    return spread * np.random.default_rng(7).normal(size=(1, 4, 3, 6, 6))


def measure(
    clip: Clip, *, cuts: Sequence[int] = (), spreads: Sequence[float] = (), fps: float = FPS
) -> DriftMeter:
    """A meter fed the clip in chunks that are cut before these video frames."""
    meter = DriftMeter(fps)
    for index, frames in enumerate(np.split(clip, cuts or range(CHUNK, len(clip), CHUNK))):
        meter.add(frames, noise(spreads[index] if spreads else 1.0), index=index)
    return meter


def plain(*color: int) -> Clip:
    return np.full((8, 8, 3), color, np.uint8)


def statistics(frame: Clip) -> dict[str, float]:
    return dict(zip(FRAME_MEASURES, frame_statistics(frame), strict=True))


def test_luma_is_bt_709() -> None:
    lumas = [statistics(plain(*color))["luma"] for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    assert lumas == pytest.approx([0.2126, 0.7152, 0.0722])


def test_black_is_dark_and_white_is_bright() -> None:
    frame = np.concatenate([plain(0, 0, 0), plain(0, 0, 0), plain(255, 255, 255)])
    assert statistics(frame)["dark"] == pytest.approx(2 / 3)
    assert statistics(frame)["bright"] == pytest.approx(1 / 3)


def test_gray_has_no_colour_and_red_is_all_colour() -> None:
    gray, red = statistics(plain(90, 90, 90)), statistics(plain(255, 0, 0))
    assert (gray["saturation"], gray["colourfulness"]) == pytest.approx((0, 0), abs=1e-4)
    assert red["saturation"] == 1
    assert red["colourfulness"] == pytest.approx(0.3 * math.hypot(255, 127.5))


def test_nearly_black_pixels_have_little_colour() -> None:
    frame = np.concatenate([plain(2, 0, 0), plain(200, 200, 200)])
    assert statistics(frame)["saturation"] == pytest.approx(2 / 202)


def test_contrast_and_detail_of_a_checkerboard() -> None:
    board = np.indices((8, 8)).sum(0)[..., None] % 2 * np.full(3, 255)
    of_board = statistics(board.astype(np.uint8))
    assert of_board["contrast"] == pytest.approx(0.5)
    assert of_board["detail"] == pytest.approx(1020**2)  # 4 x 255 up or down


def test_a_change_does_not_wrap_around() -> None:
    assert change(plain(0, 0, 0), plain(255, 255, 255)) == 255


def test_a_median_slope_is_robust_to_outliers_and_gaps() -> None:
    x = np.arange(20.0)
    y = 3 * x + 1
    y[[4, 11]], y[7] = 500, math.nan
    assert median_slope(x, y) == pytest.approx(3)
    assert math.isnan(median_slope(x[:1], y[:1]))


def test_a_median_slope_of_a_day_of_chunks_subsamples_pairs() -> None:
    x = np.arange(100_000.0)  # all pairs would take 40 GB
    assert median_slope(x, 0.25 * x) == pytest.approx(0.25)


def test_a_brightening_clip_has_the_slope_it_was_made_with() -> None:
    clip = moving(192) + (np.arange(192) // 2).astype(np.uint8)[:, None, None, None]
    summary = measure(clip, fps=FPS / 2).summary()
    slope = FPS / 2 * 30 / 255  # half a level a video frame
    assert summary["slope_per_minute"]["luma"] == pytest.approx(slope, rel=1e-3)
    assert summary["notes"][0].startswith("exposure (0 to 1) rises 0.94 a minute, from 0.")
    assert "; motion (levels per frame) " in summary["notes"][0]
    short = measure(clip[:96]).summary()["notes"][0]  # its rate would say little
    assert short.startswith("exposure (0 to 1) rises from 0.")


def test_a_clip_that_freezes_is_reported_with_its_exposure() -> None:
    clip = moving(180)
    clip[96:] = clip[95]
    summary = measure(clip).summary()
    assert summary["notes"] == [
        f"exposure (0 to 1) steady at {summary['first']['luma']:.2g}; motion stops after chunk 7"
    ]
    assert summary["slope_per_minute"]["motion"] < 0
    assert summary["last"]["motion"] == 0
    assert summary["worst"]["motion"]["chunk"] == 8
    assert [chunk["seam"] for chunk in summary["chunks"][9:]] == [None] * 6


def test_a_pause_is_not_a_stop() -> None:
    clip = moving(180)
    clip[96:120] = clip[95]
    assert "motion stops" not in measure(clip).summary()["notes"][0]


def test_a_jump_at_the_start_of_a_chunk_is_a_seam() -> None:
    clip = moving(120)
    clip[60:] = np.roll(clip[60:], 17, 2)
    summary = measure(clip).summary()
    seams = [chunk["seam"] for chunk in summary["chunks"]]
    assert seams[0] is None
    assert seams[5] > 3
    assert seams[1:5] + seams[6:] == pytest.approx([1] * 8)
    assert summary["worst"]["seam"]["chunk"] == 5
    assert summary["notes"][1:] == [f"seam {seams[5]:.2g} at chunk 5"]


def test_a_jump_between_frozen_chunks_is_a_seam() -> None:
    clip = np.repeat(moving(2), CHUNK, axis=0)
    meter = measure(clip)
    assert meter.chunks[1].seam > 10
    assert meter.summary()["worst"]["seam"]["usual"] == 1  # what a good seam has, not these


def test_motion_that_starts_after_a_pause_is_not_a_seam() -> None:
    clip = np.concatenate([np.repeat(moving(1), CHUNK, axis=0), moving(CHUNK + 1)[1:]])
    assert measure(clip).chunks[1].seam == pytest.approx(1)


def test_fading_colours_lose_saturation_and_nothing_else() -> None:
    share = np.linspace(0, 0.8, 96)[:, None, None, None]
    clip = moving(96).astype(float)
    luma = (clip @ np.array([0.2126, 0.7152, 0.0722]))[..., None]
    summary = measure((clip * (1 - share) + luma * share).round().astype(np.uint8)).summary()
    assert summary["slope_per_minute"]["saturation"] < 0
    assert summary["last"]["colourfulness"] < 0.6 * summary["first"]["colourfulness"]
    assert summary["notes"][0].startswith("exposure (0 to 1) steady")
    assert [note for note in summary["notes"] if note.startswith("saturation (0 to 1) falls")]


def test_growing_latents_are_reported_against_the_first_chunks() -> None:
    spreads = [1 + 0.05 * index for index in range(10)]
    summary = measure(moving(120), spreads=spreads).summary()
    stds = [chunk["latent_std"] for chunk in summary["chunks"]]
    assert stds[0] == 1  # the first chunk is the reference
    assert stds[2:] == pytest.approx([s / 1.05 for s in spreads[2:]], rel=1e-3)
    slope = 0.05 / 1.05 / (CHUNK / FPS / 60)
    assert summary["slope_per_minute"]["latent_std"] == pytest.approx(slope, rel=0.01)
    assert any(
        note.startswith("latent std (relative to the first chunks) rises")
        for note in summary["notes"]
    )


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ((1.062, 1.131), "rises from 1.06 to 1.13"),
        ((0.5, 1.131), "rises from 0.5 to 1.1"),
        ((1.1, 1.1), "steady at 1.1"),
    ],
)
def test_a_trend_has_the_digits_that_tell_its_ends_apart(
    ends: tuple[float, float], words: str
) -> None:
    meter = measure(moving(120), spreads=[1 + 0.05 * index for index in range(10)])
    series = _Series("latent_std", meter.chunks, FPS)
    first, last = ({"latent_std": value} for value in ends)
    assert _trend(series, {"first": first, "last": last}).endswith(words)


def test_channels_that_shift_against_each_other_do_not_cancel_out() -> None:
    meter = DriftMeter(FPS)
    meter.add(moving(4), noise(), index=0)
    for index in (1, 2):
        meter.add(moving(4), noise(), index=index)
    away = np.array([1.0, -1, 1, -1])[None, :, None, None, None]
    assert meter.add(moving(4), noise() + away, index=3).latent_shift == pytest.approx(1, rel=0.1)


def test_torch_and_numpy_latents_measure_the_same() -> None:
    import torch

    of_numpy, of_torch = DriftMeter(FPS), DriftMeter(FPS)
    for index, array in enumerate((noise(), noise(2))):
        of_numpy.add(moving(4), array, index=index)
        of_torch.add(moving(4), torch.from_numpy(array).to(torch.bfloat16), index=index)
    assert of_torch.chunks[1].latent_std == pytest.approx(of_numpy.chunks[1].latent_std, rel=1e-2)


@pytest.mark.parametrize("cuts", [(1, 5, 50, 52, 180), (7, 100), (200,)])
def test_totals_do_not_depend_on_the_chunks(cuts: tuple[int, ...]) -> None:
    light = 60 + 50 * np.sin(np.arange(208) / 20)
    clip = moving(208) + light.astype(np.uint8)[:, None, None, None]
    one, other = measure(clip).summary(), measure(clip, cuts=cuts).summary()
    for part in ("first", "last", "mean"):
        assert {k: one[part][k] for k in FRAME_MEASURES} == {
            k: other[part][k] for k in FRAME_MEASURES
        }
    assert (one["frames"], one["duration_s"]) == (other["frames"], other["duration_s"])


def test_the_first_and_the_last_five_seconds_are_compared() -> None:
    clip = np.concatenate(
        [
            np.full((n, 8, 8, 3), level, np.uint8)
            for n, level in ((5 * FPS, 51), (FPS, 255), (5 * FPS, 102))
        ]
    )
    summary = measure(clip).summary()
    lumas = (summary["first"]["luma"], summary["last"]["luma"], summary["window_s"])
    assert lumas == pytest.approx((0.2, 0.4, 5))


def test_the_halves_of_a_short_video_are_compared() -> None:
    clip = np.concatenate([np.full((FPS, 8, 8, 3), level, np.uint8) for level in (51, 102)])
    summary = measure(clip).summary()
    lumas = (summary["first"]["luma"], summary["last"]["luma"], summary["window_s"])
    assert lumas == pytest.approx((0.2, 0.4, 1))


def test_a_chunk_knows_where_it_starts() -> None:
    chunk = measure(moving(30), cuts=(9, 21)).chunks[2]
    assert (chunk.index, chunk.first_frame, chunk.frames) == (2, 21, 9)
    assert chunk.start_s == 21 / FPS


def test_fifty_chunks_need_no_more_memory_than_ten() -> None:
    meter = DriftMeter(FPS)
    traced = {}
    tracemalloc.start()
    try:
        for index in range(50):
            meter.add(moving(4, side=256), noise(), index=index)
            traced[index] = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    frame = 256 * 256 * 3
    assert traced[49] < 2 * frame
    assert traced[49] - traced[9] < frame / 2


@pytest.mark.parametrize("frames", [1, 5, 40])
@pytest.mark.parametrize("level", [0, 255])
def test_a_plain_video_gives_no_nan(level: int, frames: int) -> None:
    clip = np.full((frames, 16, 16, 3), level, np.uint8)
    meter = DriftMeter(FPS)
    for index, part in enumerate(np.split(clip, [1])):
        if len(part):
            meter.add(part, np.zeros((1, 4, 1, 2, 2)), index=index)
    summary = meter.summary()
    json.dumps(summary, allow_nan=False)
    expected = "motion (levels per frame) unknown" if frames == 1 else "nothing moves"
    assert summary["notes"][0] == f"exposure (0 to 1) steady at {level // 255}; {expected}"


def test_an_empty_rollout_has_a_summary() -> None:
    summary = DriftMeter(FPS).summary()
    assert (summary["chunks"], summary["notes"], summary["worst"]) == ([], [], {})
    json.dumps(summary, allow_nan=False)


def test_clipped_pixels_are_reported() -> None:
    clip = moving(180)
    for at in range(180):
        clip[at, : at // 10] = 255
    notes = measure(clip).summary()["notes"]
    assert any(note.startswith("bright pixels grow from ") for note in notes)


def test_numbers_are_rounded() -> None:
    luma = measure(moving(24)).summary()["chunks"][0]["luma"]
    assert luma == float(f"{luma:.4g}")


def test_a_rendered_world_does_not_drift() -> None:
    from wancli.demo.world import Combination, Scene, render

    scene = Scene(Combination("red", "circle", "moving right", "gray"), 0.2, 0.5, 0.5, 0.24, 0.0)
    video = render([scene], frames=9 + 9 * CHUNK)[0].permute(1, 2, 3, 0).numpy()
    cuts = range(9, len(video), CHUNK)
    meter = measure(((video + 1) * 127.5).round().astype(np.uint8), cuts=cuts)
    summary = meter.summary()
    assert len(summary["notes"]) == 1
    assert [chunk.seam for chunk in meter.chunks[1:]] == pytest.approx([1] * 9, abs=0.3)
