"""The measured drift of rollouts that drift, and of one that does not."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.demo.test_judge import MOVING, STILL, make_video, scene
from wancli.demo.stability import Change, change, last_part, mean_changes

FRAMES = 100
ROUND = replace(MOVING, shape="circle")  # its outline has no phase on the pixel grid


def test_a_render_does_not_drift() -> None:
    steady = change(make_video(scene(MOVING), frames=FRAMES), "red")
    assert [abs(size) < 1 for size in (steady.exposure, steady.area)] == [True, True]
    assert steady.speed == pytest.approx(0, abs=1)


def test_an_object_at_rest_has_no_speed() -> None:
    assert change(make_video(scene(STILL), frames=FRAMES), "red").speed is None


def turning_into(end: Tensor) -> Tensor:
    """A video that starts steady and ends as `end`."""
    video = make_video(scene(ROUND), frames=FRAMES)
    video[FRAMES // 2 :] = end[FRAMES // 2 :]
    return video


def test_a_shape_that_shrinks_and_slows_down_is_detected() -> None:
    slower = replace(scene(ROUND), radius=0.18, speed=0.12)
    drift = change(turning_into(make_video(slower, frames=FRAMES)), "red")
    assert drift.area == pytest.approx(100 * (0.9**2 - 1), abs=1)
    assert drift.speed == pytest.approx(-50, abs=2)


def test_a_video_that_gets_brighter_is_detected() -> None:
    brighter = (make_video(scene(ROUND), frames=FRAMES).float() * 1.1).clamp_max(255).byte()
    assert 5 < change(turning_into(brighter), "red").exposure < 11


def test_a_lost_object_has_drifted_completely() -> None:
    gone = make_video(replace(scene(ROUND), radius=-1.0), frames=FRAMES)
    drift = change(turning_into(gone), "red")
    assert (drift.area, drift.speed) == (-100, -100)


def test_the_last_part_is_the_last_tenth() -> None:
    assert torch.equal(last_part(torch.arange(30)), torch.tensor([27, 28, 29]))


def test_changes_up_and_down_do_not_cancel() -> None:
    sizes = mean_changes([Change(2.0, -4.0, None), Change(-4.0, 2.0, 6.0)])
    assert sizes == {"exposure": 3.0, "area": 3.0, "speed": 6.0}
