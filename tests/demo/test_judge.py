"""The judge against renders whose answer is known, whole and ruined."""

import math
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

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


def scene(what: Combination, *, x: float = 0.5) -> Scene:
    return Scene(what, radius=0.2, x=x, y=0.5, speed=0.24, phase=0.3)


def film(*scenes: Scene, first: int = 0, frames: int = FRAMES) -> Tensor:
    """Uint8 [T, H, W, 3]; of several scenes, the brighter wins, pixel by pixel."""
    clip = render(scenes, first=first, frames=frames).amax(0)
    levels = (clip.permute(1, 2, 3, 0) + 1) * 127.5
    return levels.round().byte()


def blurred(video: Tensor, *, sigma: float, noise: float = 0.0) -> Tensor:
    """A Gaussian blur (pixels), then noise (levels)."""
    reach = math.ceil(3 * sigma)
    kernel = torch.softmax(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2), 0)
    planes = video.float().permute(0, 3, 1, 2).flatten(0, 1)[:, None]
    planes = pad(planes, (reach,) * 4, mode="replicate")
    planes = conv2d(conv2d(planes, kernel[None, None, None]), kernel[None, None, :, None])
    out: Tensor = planes.unflatten(0, (-1, 3))[:, :, 0].permute(0, 2, 3, 1)
    grain = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    return (out + noise * grain).round().clamp(0, 255).byte()


def psnr(a: Tensor, b: Tensor) -> float:
    return float(10 * torch.log10(255**2 / (a.float() - b.float()).square().mean()))


def empty() -> Tensor:
    return film(replace(scene(STILL), radius=-1.0))


def drawn(every: int) -> list[tuple[Combination, Tensor]]:
    """Every so manieth combination, with what its prompt leaves open drawn at random."""
    rng = random.Random(every)
    everything = [*combinations(held_out=True), *combinations(held_out=False)]
    out = []
    for what in everything[::every]:
        where = replace(sample_scene(rng, everything), combination=what)
        out.append((what, film(where, first=rng.randrange(200))))
    return out


def mistakes(clips: list[tuple[Combination, Tensor]]) -> list[tuple[Combination, Verdict]]:
    verdicts = [(what, judge(clip)) for what, clip in clips]
    return [(what, verdict) for what, verdict in verdicts if not all(verdict.agrees(what).values())]


def test_true_renders_are_judged_right() -> None:
    clips = drawn(42)
    for axis, words in zip(
        ("color", "shape", "motion", "background"),
        (COLORS, SHAPES, MOTIONS, BACKGROUNDS),
        strict=True,
    ):
        assert {getattr(what, axis) for what, _ in clips} == set(words)
    assert mistakes(clips) == []


def test_soft_and_noisy_renders_are_judged_right() -> None:
    clips = drawn(61)
    ruined = [(what, blurred(clip, sigma=1.0, noise=7.0)) for what, clip in clips]
    assert all(25 < psnr(a, b) < 32 for (_, a), (_, b) in zip(clips, ruined, strict=True))
    assert mistakes(ruined) == []


@pytest.mark.slow
def test_every_combination_is_judged_right() -> None:
    clips = drawn(1)
    assert mistakes(clips) == []
    ruined = [(what, blurred(clip, sigma=1.0, noise=7.0)) for what, clip in clips]
    assert len(mistakes(ruined)) <= len(clips) / 100


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_longer_film_goes_on_with_its_motion(motion: str) -> None:
    what = Combination("cyan", "triangle", motion, "brown")
    assert mistakes([(what, film(scene(what), first=7, frames=81))]) == []


def test_noise_shows_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(FRAMES, SIDE, SIDE, 3, generator=generator)
    grain = (127 + 50 * white).clamp(0, 255).byte()
    for video in (grain, blurred(127 + 600 * white, sigma=5)):
        verdict = judge(video)
        assert (verdict.color, verdict.shape, verdict.motion) == (NONE, NONE, NONE)


def test_an_empty_stage_shows_only_its_background() -> None:
    assert judge(empty()) == Verdict(NONE, NONE, NONE, "navy")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_blob_has_a_place_but_no_shape(shape: str) -> None:
    verdict = judge(blurred(film(scene(replace(MOVING, shape=shape))), sigma=6))
    assert verdict.shape == NONE
    assert (verdict.color, verdict.motion) == ("red", "moving right")


def test_a_frozen_film_stands_still() -> None:
    assert judge(film(scene(MOVING))[9].expand(FRAMES, -1, -1, -1)).motion == "standing still"


def test_a_film_played_backwards_moves_the_other_way() -> None:
    assert judge(film(scene(MOVING)).flip(0)).motion == "moving left"


def test_frames_in_a_random_order_are_no_motion() -> None:
    order = torch.randperm(FRAMES, generator=torch.Generator().manual_seed(0))
    assert judge(film(scene(MOVING))[order]).motion == NONE


def test_a_single_rise_is_no_bouncing() -> None:
    bouncing = film(replace(scene(replace(MOVING, motion="bouncing")), phase=0.0))
    assert judge(bouncing).motion == "bouncing"
    rise = torch.linspace(0, FPS / 0.55 / 2, FRAMES).round().long()  # 0.55 hops a second
    assert judge(bouncing[rise]).motion == "moving up"


def test_an_object_that_vanishes_half_way_is_no_success() -> None:
    video = film(scene(STILL))
    video[FRAMES // 2 :] = empty()[FRAMES // 2 :]
    assert judge(video) == Verdict(NONE, NONE, NONE, "navy", first="red")


def test_the_first_frame_is_seen_by_itself() -> None:
    video = film(scene(STILL))
    video[0] = film(scene(replace(STILL, color="blue")))[0]
    verdict = judge(video)
    assert (verdict.color, verdict.first) == ("red", "blue")


def test_an_object_that_fades_is_no_success() -> None:
    share = torch.linspace(1, 0.2, FRAMES)[:, None, None, None]
    assert judge((film(scene(STILL)) * share + empty() * (1 - share)).byte()).shape == NONE


def test_half_an_object_has_no_shape() -> None:
    for shape in ("circle", "square"):
        video = film(scene(replace(STILL, shape=shape)))
        video[:, :, SIDE // 2 :] = empty()[:, :, SIDE // 2 :]
        assert judge(video).shape == NONE


@pytest.mark.parametrize("color", ["red", "white"])
def test_two_objects_are_neither_a_shape_nor_a_motion(color: str) -> None:
    other = replace(STILL, color=color)
    two = [replace(alone, radius=0.16) for alone in (scene(STILL), scene(other, x=0.1))]
    verdict = judge(film(*two))
    assert (verdict.shape, verdict.motion) == (NONE, NONE)


def test_an_object_that_changes_color_has_none() -> None:
    video = film(scene(STILL))
    video[FRAMES // 2 :] = film(scene(replace(STILL, color="blue")))[FRAMES // 2 :]
    assert judge(video).color == NONE


def test_a_shape_half_way_from_circle_to_square_is_neither() -> None:
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


def test_a_render_measures_what_it_was_drawn_with() -> None:
    video = film(scene(replace(MOVING, shape="circle")))
    measured = measure(video, "red")
    assert measured.area == pytest.approx(math.pi * 0.2**2, rel=0.02)
    assert measured.speed == pytest.approx(0.24, rel=0.02)
    assert measured.exposure == pytest.approx(float(video.float().mean()))


def test_what_is_not_there_measures_nothing() -> None:
    measured = measure(film(scene(STILL)), "cyan")
    assert (measured.area, measured.speed) == (0.0, 0.0)
