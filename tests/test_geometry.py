import pytest
from hypothesis import given
from hypothesis import strategies as st

from wancli.errors import PlanError
from wancli.geometry import Strides, latent_shape

WAN_21, WAN_22_5B = Strides(), Strides(temporal=4, spatial=16, patch=2)


@pytest.mark.parametrize(
    ("size", "frames", "strides", "tokens"),
    [((832, 480), 81, WAN_21, 32_760), ((1280, 704), 121, WAN_22_5B, 27_280)],
)  # the sequence lengths that the models' authors name
def test_published_sizes_have_the_published_tokens(
    size: tuple[int, int], frames: int, strides: Strides, tokens: int
):
    shape = latent_shape(
        num_frames=frames, width=size[0], height=size[1], channels=16, strides=strides
    )
    assert shape.tokens == tokens


@given(st.integers(1, 4000))
def test_the_hint_for_a_bad_frame_count_names_two_good_ones(frames: int):
    try:
        shape = latent_shape(num_frames=frames, width=96, height=96, channels=4, strides=WAN_21)
    except PlanError as error:
        low, high = map(int, error.hint.removeprefix("use ").split(" or "))
        assert low < frames < high == low + 4
        assert low % 4 == 1
    else:
        assert shape.frames == (frames + 3) // 4


@given(st.integers(16, 4000), st.integers(16, 4000))
def test_the_hint_for_a_bad_size_names_a_good_one(width: int, height: int):
    try:
        latent_shape(num_frames=1, width=width, height=height, channels=4, strides=WAN_21)
    except PlanError as error:
        sides = error.hint.removeprefix("--size ").split("x")
        near = dict(zip(("width", "height"), map(int, sides), strict=True))
        latent_shape(num_frames=1, channels=4, strides=WAN_21, **near)
        assert abs(near["width"] - width) <= 8
        assert abs(near["height"] - height) <= 8
    else:
        assert width % 16 == height % 16 == 0
