"""The judge on renders with known answers, intact and degraded."""

import math
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from wancli.demo.judge import NONE, Verdict, judge, measure
from wancli.demo.world import (
    BACKGROUNDS,
    COLORS,
    FPS,
    FRAMES,
    MOTIONS,
    SHAPES,
    SIDE,
    Combination,
    Scene,
    combinations,
    render,
    sample_scene,
)

MOVING = Combination("red", "square", "moving right", "navy")
STILL = replace(MOVING, motion="standing still")


def scene(combination: Combination, *, x: float = 0.5) -> Scene:
    return Scene(combination, radius=0.2, x=x, y=0.5, speed=0.24, phase=0.3)


def make_video(*scenes: Scene, first: int = 0, frames: int = FRAMES) -> Tensor:
    """Uint8 [T, H, W, 3]; of several scenes, each pixel shows the brightest."""
    clip = render(scenes, first=first, frames=frames).amax(0)
    levels = (clip.permute(1, 2, 3, 0) + 1) * 127.5
    return levels.round().byte()


def blurred(video: Tensor, *, sigma: float, noise: float = 0.0) -> Tensor:
    """A Gaussian blur (pixels) that repeats the edges, then noise (levels)."""
    reach, side = math.ceil(3 * sigma), video.shape[1]
    offsets = torch.arange(-reach, reach + 1)
    kernel = torch.softmax(-(offsets**2) / (2 * sigma**2), 0).expand(side, -1)
    sources = (torch.arange(side)[:, None] + offsets).clamp(0, side - 1)
    smooth = torch.zeros(side, side).scatter_add_(1, sources, kernel)  # to rows, from columns
    planes = smooth @ video.float().permute(0, 3, 1, 2) @ smooth.T
    out = planes.permute(0, 2, 3, 1)
    grain = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    return (out + noise * grain).round().clamp(0, 255).byte()


def psnr(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(255**2 / (a.float() - b.float()).square().mean()))


def empty() -> Tensor:
    return make_video(replace(scene(STILL), radius=-1.0))


def sample_clips(every: int) -> list[tuple[Combination, Tensor]]:
    """Every nth combination, with the properties its prompt leaves open chosen at random."""
    rng = random.Random(every)
    every_combination = [*combinations(held_out=True), *combinations(held_out=False)]
    out = []
    for combination in every_combination[::every]:
        sampled = replace(sample_scene(rng, every_combination), combination=combination)
        out.append((combination, make_video(sampled, first=rng.randrange(200))))
    return out


def mistakes(clips: list[tuple[Combination, Tensor]]) -> list[tuple[Combination, Verdict]]:
    verdicts = [(combination, judge(clip)) for combination, clip in clips]
    return [
        (combination, verdict)
        for combination, verdict in verdicts
        if not all(verdict.agrees(combination).values())
    ]


def test_renders_are_judged_correctly() -> None:
    clips = sample_clips(42)
    for axis, words in zip(
        ("color", "shape", "motion", "background"),
        (COLORS, SHAPES, MOTIONS, BACKGROUNDS),
        strict=True,
    ):
        assert {getattr(combination, axis) for combination, _ in clips} == set(words)
    assert mistakes(clips) == []


def test_blurred_and_noisy_renders_are_judged_correctly() -> None:
    clips = sample_clips(61)
    degraded = [(combination, blurred(clip, sigma=1.0, noise=7.0)) for combination, clip in clips]
    assert all(25 < psnr(a, b) < 32 for (_, a), (_, b) in zip(clips, degraded, strict=True))
    assert mistakes(degraded) == []


@pytest.mark.slow
def test_every_combination_is_judged_correctly() -> None:
    clips = sample_clips(1)
    assert mistakes(clips) == []
    some = clips[::3]  # of which one in a hundred may be misjudged
    degraded = [(combination, blurred(clip, sigma=1.0, noise=7.0)) for combination, clip in some]
    assert len(mistakes(degraded)) <= len(some) / 100


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_longer_video_continues_its_motion(motion: str) -> None:
    combination = Combination("cyan", "triangle", motion, "brown")
    assert mistakes([(combination, make_video(scene(combination), first=7, frames=81))]) == []


def test_noise_has_no_object() -> None:
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(FRAMES, SIDE, SIDE, 3, generator=generator)
    grain = (127 + 50 * white).clamp(0, 255).byte()
    for video in (grain, blurred(127 + 600 * white, sigma=5)):
        verdict = judge(video)
        assert (verdict.color, verdict.shape, verdict.motion) == (NONE, NONE, NONE)


def test_an_empty_scene_has_only_a_background() -> None:
    assert judge(empty()) == Verdict(NONE, NONE, NONE, "navy")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_blob_has_a_motion_but_no_shape(shape: str) -> None:
    verdict = judge(blurred(make_video(scene(replace(MOVING, shape=shape))), sigma=6))
    assert verdict.shape == NONE
    assert (verdict.color, verdict.motion) == ("red", "moving right")


def test_a_frozen_video_stands_still() -> None:
    assert judge(make_video(scene(MOVING))[9].expand(FRAMES, -1, -1, -1)).motion == "standing still"


def test_a_reversed_video_moves_the_other_way() -> None:
    assert judge(make_video(scene(MOVING)).flip(0)).motion == "moving left"


def test_shuffled_frames_have_no_motion() -> None:
    order = torch.randperm(FRAMES, generator=torch.Generator().manual_seed(0))
    assert judge(make_video(scene(MOVING))[order]).motion == NONE


def test_a_single_rise_is_not_bouncing() -> None:
    bouncing = make_video(replace(scene(replace(MOVING, motion="bouncing")), phase=0.0))
    assert judge(bouncing).motion == "bouncing"
    rise = torch.linspace(0, FPS / 0.55 / 2, FRAMES).round().long()  # 0.55 hops a second
    assert judge(bouncing[rise]).motion == "moving up"


def test_an_object_that_vanishes_halfway_fails() -> None:
    video = make_video(scene(STILL))
    video[FRAMES // 2 :] = empty()[FRAMES // 2 :]
    assert judge(video) == Verdict(NONE, NONE, NONE, "navy", first="red")


def test_the_first_frame_is_judged_separately() -> None:
    video = make_video(scene(STILL))
    video[0] = make_video(scene(replace(STILL, color="blue")))[0]
    verdict = judge(video)
    assert (verdict.color, verdict.first) == ("red", "blue")


def test_an_object_that_fades_fails() -> None:
    share = torch.linspace(1, 0.2, FRAMES)[:, None, None, None]
    assert judge((make_video(scene(STILL)) * share + empty() * (1 - share)).byte()).shape == NONE


def test_half_an_object_has_no_shape() -> None:
    for shape in ("circle", "square"):
        video = make_video(scene(replace(STILL, shape=shape)))
        video[:, :, SIDE // 2 :] = empty()[:, :, SIDE // 2 :]
        assert judge(video).shape == NONE


@pytest.mark.parametrize("color", ["red", "white"])
def test_two_objects_have_neither_shape_nor_motion(color: str) -> None:
    other = replace(STILL, color=color)
    two = [replace(alone, radius=0.16) for alone in (scene(STILL), scene(other, x=0.1))]
    verdict = judge(make_video(*two))
    assert (verdict.shape, verdict.motion) == (NONE, NONE)


def test_an_object_that_changes_color_has_no_color() -> None:
    video = make_video(scene(STILL))
    video[FRAMES // 2 :] = make_video(scene(replace(STILL, color="blue")))[FRAMES // 2 :]
    assert judge(video).color == NONE


def test_a_shape_halfway_between_circle_and_square_is_neither() -> None:
    grid = (torch.arange(SIDE) + 0.5) / SIDE - 0.5
    outline = (grid[:, None].abs() ** 3 + grid.abs() ** 3) ** (1 / 3) - 0.2
    cover = (0.5 - outline * SIDE).clamp(0, 1)[..., None]
    ground, paint = torch.tensor(BACKGROUNDS["navy"]), torch.tensor(COLORS["red"])
    video = (ground * (1 - cover) + paint * cover).byte().expand(FRAMES, -1, -1, -1)
    verdict = judge(video)
    assert (verdict.color, verdict.shape, verdict.motion) == ("red", NONE, "standing still")


def test_a_verdict_agrees_word_by_word() -> None:
    verdict = Verdict("red", NONE, "moving right", "navy")
    assert verdict.agrees(MOVING) == {
        "color": True,
        "shape": False,
        "motion": True,
        "background": True,
    }


def test_a_render_measures_as_it_was_drawn() -> None:
    video = make_video(scene(replace(MOVING, shape="circle")))
    measurement = measure(video, "red")
    assert measurement.area == pytest.approx(math.pi * 0.2**2, rel=0.02)
    assert measurement.speed == pytest.approx(0.24, rel=0.02)
    assert measurement.exposure == pytest.approx(float(video.float().mean()))


def test_a_missing_object_measures_zero() -> None:
    measurement = measure(make_video(scene(STILL)), "cyan")
    assert (measurement.area, measurement.speed) == (0.0, 0.0)
