"""What the evaluation says of rollouts that drift, and of one that does not."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.demo.test_judge import MOVING, STILL, film, scene
from wancli.demo.stability import Change, change, last_part, mean_changes

FRAMES = 100
ROUND = replace(MOVING, shape="circle")  # its outline has no phase on the pixel grid


def test_a_true_render_does_not_change() -> None:
    steady = change(film(scene(MOVING), frames=FRAMES), "red")
    assert [abs(size) < 1 for size in (steady.exposure, steady.area)] == [True, True]
    assert steady.speed == pytest.approx(0, abs=1)


def test_what_stays_in_its_place_has_no_speed() -> None:
    assert change(film(scene(STILL), frames=FRAMES), "red").speed is None


def becoming(end: Tensor) -> Tensor:
    """A video that begins as a steady one and ends as `end`."""
    video = film(scene(ROUND), frames=FRAMES)
    video[FRAMES // 2 :] = end[FRAMES // 2 :]
    return video


def test_a_shape_that_shrinks_and_slows_down_is_seen() -> None:
    slower = replace(scene(ROUND), radius=0.18, speed=0.12)
    seen = change(becoming(film(slower, frames=FRAMES)), "red")
    assert seen.area == pytest.approx(100 * (0.9**2 - 1), abs=1)
    assert seen.speed == pytest.approx(-50, abs=2)


def test_a_picture_that_gets_brighter_is_seen() -> None:
    brighter = (film(scene(ROUND), frames=FRAMES).float() * 1.1).clamp_max(255).byte()
    assert 5 < change(becoming(brighter), "red").exposure < 11


def test_an_object_that_is_lost_has_changed_whole() -> None:
    gone = film(replace(scene(ROUND), radius=-1.0), frames=FRAMES)
    seen = change(becoming(gone), "red")
    assert (seen.area, seen.speed) == (-100, -100)


def test_the_last_part_is_a_tenth() -> None:
    assert torch.equal(last_part(torch.arange(30)), torch.tensor([27, 28, 29]))


def test_changes_up_and_down_do_not_cancel() -> None:
    sizes = mean_changes([Change(2.0, -4.0, None), Change(-4.0, 2.0, 6.0)])
    assert sizes == {"exposure": 3.0, "area": 3.0, "speed": 6.0}
