import numpy as np
import pytest

from wancli.video.measures import motion


def test_motion_is_the_mean_change_between_consecutive_frames():
    frames = np.zeros((3, 2, 2, 3), np.uint8)
    frames[1] = 10  # changes by 10, then by 6 in half of the pixels
    frames[2] = 10
    frames[2, 0] = 4
    assert motion(frames) == pytest.approx((10 + 3) / 2)
    assert motion(frames[:1]) == 0
