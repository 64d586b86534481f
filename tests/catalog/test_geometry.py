import pytest
from hypothesis import given
from hypothesis import strategies as st

from wancli.catalog.geometry import Span, Strides, latent_shape, lay_out, size_like
from wancli.errors import PlanError

WAN_21, WAN_22_5B = Strides(), Strides(temporal=4, spatial=16, patch=2)


@pytest.mark.parametrize(
    ("size", "frames", "strides", "tokens"),
    [((832, 480), 81, WAN_21, 32_760), ((1280, 704), 121, WAN_22_5B, 27_280)],
)  # the sequence lengths that the authors publish
def test_published_sizes_have_the_published_tokens(
    size: tuple[int, int], frames: int, strides: Strides, tokens: int
):
    shape = latent_shape(
        num_frames=frames, width=size[0], height=size[1], channels=16, strides=strides
    )
    assert shape.tokens == tokens


@pytest.mark.parametrize(
    ("size", "like"), [((96, 96), (96, 80)), ((112, 80), (96, 80)), ((96, 80), (96, 80))]
)
def test_the_size_for_a_picture_is_the_one_around_its_area_that_cuts_least(
    size: tuple[int, int], like: tuple[int, int]
):
    assert size_like((1000, 794), size, WAN_21) == like


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
        sides = error.hint.strip("`").removeprefix("size ").split("x")
        near = dict(zip(("width", "height"), map(int, sides), strict=True))
        latent_shape(num_frames=1, channels=4, strides=WAN_21, **near)
        assert abs(near["width"] - width) <= 8
        assert abs(near["height"] - height) <= 8
    else:
        assert width % 16 == height % 16 == 0


def test_chunks_are_laid_end_to_end():
    context, spans = lay_out(3, chunk_frames=3)
    assert context == ()
    assert spans == (Span(0, 0, 3), Span(1, 3, 3), Span(2, 6, 3))
    assert [span.video_frames(Strides()) for span in spans] == [9, 12, 12]


def test_the_first_latent_frame_can_be_its_own_chunk():
    _, spans = lay_out(3, chunk_frames=3, independent_first_frame=True)
    assert [(span.first_frame, span.frames) for span in spans] == [(0, 1), (1, 3), (4, 3)]


def test_context_chunks_come_first_and_have_negative_indices():
    context, spans = lay_out(1, chunk_frames=3, context=7, independent_first_frame=True)
    assert context == (Span(-3, 0, 1), Span(-2, 1, 3), Span(-1, 4, 3))
    assert spans == (Span(0, 7, 3),)


def test_only_the_first_generated_chunk_is_given_frames():
    context, spans = lay_out(2, chunk_frames=3, context=3, clean_frames=1)
    assert context == (Span(-1, 0, 3),)
    assert spans == (Span(0, 3, 3, clean_frames=1), Span(1, 6, 3))


def test_context_that_does_not_fill_chunks_is_rejected():
    with pytest.raises(PlanError) as caught:
        lay_out(1, chunk_frames=3, context=7)
    assert caught.value.hint == "use 6 of them"


def test_a_hundred_thousand_chunks_are_laid_out_quickly():
    _, spans = lay_out(100_000, chunk_frames=3)
    assert spans[-1] == Span(99_999, 299_997, 3)
