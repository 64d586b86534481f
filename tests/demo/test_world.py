"""The demo's world: held-out combinations, prompts, and renders."""

import random
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

from wancli.demo.world import (
    BACKGROUNDS,
    COLORS,
    FRAMES,
    MOTIONS,
    SHAPES,
    SIDE,
    SYNONYMS,
    Combination,
    Scene,
    combinations,
    describe,
    render,
    sample_scene,
)

AXES = {"color": COLORS, "shape": SHAPES, "motion": MOTIONS, "background": BACKGROUNDS}
TRAINED, HELD_OUT = combinations(held_out=False), combinations(held_out=True)


def scene(motion: str = "standing still", *, x: float = 0.5, y: float = 0.5) -> Scene:
    combination = Combination("green", "triangle", motion, "brown")
    return Scene(combination, radius=0.16, x=x, y=y, speed=0.24, phase=0.3)


def contains(text: str, phrase: str) -> bool:
    return re.search(rf"\b{phrase}\b", text) is not None


def test_a_quarter_of_the_combinations_is_held_out() -> None:
    assert (len(TRAINED), len(HELD_OUT)) == (624, 208)
    assert len({*TRAINED, *HELD_OUT}) == 832


@pytest.mark.parametrize("axis", AXES)
def test_held_out_combinations_are_balanced(axis: str) -> None:
    held_out = Counter(getattr(combination, axis) for combination in HELD_OUT)
    total = held_out + Counter(getattr(combination, axis) for combination in TRAINED)
    assert set(held_out) == set(AXES[axis])
    assert all(4 * held_out[word] == total[word] for word in total)


def test_all_but_the_background_of_a_held_out_combination_was_trained() -> None:
    trained = Counter(
        (combination.color, combination.shape, combination.motion) for combination in TRAINED
    )
    assert all(
        trained[combination.color, combination.shape, combination.motion] == 3
        for combination in HELD_OUT
    )


def test_circles_do_not_spin() -> None:
    spinning = {
        combination.shape
        for combination in (*TRAINED, *HELD_OUT)
        if combination.motion == "spinning"
    }
    assert spinning == {"square", "triangle"}


def test_sampled_scenes_are_balanced_by_motion() -> None:
    rng = random.Random(0)
    motions = Counter(sample_scene(rng, TRAINED).combination.motion for _ in range(900))
    assert set(motions) == set(MOTIONS)
    assert min(motions.values()) > 70


def test_a_description_never_contradicts_its_combination() -> None:
    rng = random.Random(0)
    phrases = {word: SYNONYMS.get(word, (word,)) for axis in AXES.values() for word in axis}
    for combination in TRAINED:
        text = describe(combination, rng)
        own = [phrase for word in vars(combination).values() for phrase in phrases[word]]
        for phrase in sorted(own, key=len, reverse=True):  # "moving in a circle" before "circle"
            text = re.sub(rf"\b{phrase}\b", "", text)
        foreign = [p for synonyms in phrases.values() for p in synonyms if contains(text, p)]
        assert foreign == [], (combination, text)


def test_descriptions_leave_words_out_and_are_sometimes_empty() -> None:
    rng = random.Random(0)
    texts = [describe(TRAINED[0], rng) for _ in range(1000)]
    assert 70 < texts.count("") < 130
    assert "a red circle" in texts
    assert texts.count(TRAINED[0].prompt) > 300


def test_renders_are_reproducible_and_in_range() -> None:
    scenes = [sample_scene(random.Random(seed), TRAINED) for seed in range(4)]
    video = render(scenes)
    assert video.shape == (4, 3, FRAMES, SIDE, SIDE)
    assert torch.equal(video, render(scenes))
    assert video.abs().max() <= 1


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_render_from_a_later_frame_continues_the_video(motion: str) -> None:
    whole = render([scene(motion)], frames=60)
    assert torch.equal(render([scene(motion)], first=40, frames=20), whole[:, :, 40:])


def test_a_batch_renders_each_scene_independently() -> None:
    scenes = [scene(motion) for motion in MOTIONS]
    alone = torch.cat([render([one], frames=3) for one in scenes])
    assert torch.equal(render(scenes, frames=3), alone)


def test_objects_wrap_around_the_edges() -> None:
    middle, edge = render([scene()], frames=1), render([scene(x=0.0)], frames=1)
    torch.testing.assert_close(edge, middle.roll(SIDE // 2, -1), rtol=0, atol=1e-4)


def test_moving_by_a_full_side_changes_nothing() -> None:
    inside = render([scene("moving up", y=0.25)], frames=9)
    wrapped = render([scene("moving up", y=1.25)], frames=9)
    torch.testing.assert_close(inside, wrapped, rtol=0, atol=1e-4)


@pytest.mark.parametrize("motion", [m for m in MOTIONS if m != "standing still"])
def test_every_motion_is_visible(motion: str) -> None:
    video = render([scene(motion)])
    assert (video[:, :, 4] - video[:, :, 0]).abs().max() > 0.5
    still = render([replace(scene(motion), combination=scene().combination)])
    assert torch.equal(still[:, :, 4], still[:, :, 0])
