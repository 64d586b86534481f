"""Initial noise and renoise of rollouts."""

import pytest
import torch

from wancli.catalog.geometry import Span
from wancli.generation.noise import IndexedNoise, StreamNoise

SHAPE = (2, 4, 4)
SPANS = (Span(0, 0, 3), Span(1, 3, 3), Span(2, 6, 1))


def test_indexed_noise_does_not_depend_on_the_order_of_calls():
    one, other = IndexedNoise({0: 7}, SHAPE), IndexedNoise({0: 7}, SHAPE)
    other(SPANS[0], 0)
    assert torch.equal(one(SPANS[1], 2), other(SPANS[1], 2))
    drawn = [one(span, step) for span in SPANS[:2] for step in range(3)]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_a_seed_applies_from_its_chunk_on():
    one, other = IndexedNoise({0: 7}, SHAPE), IndexedNoise({0: 7, 1: 8}, SHAPE)
    assert torch.equal(one(SPANS[0], 1), other(SPANS[0], 1))
    assert not torch.equal(one(SPANS[1], 1), other(SPANS[1], 1))
    assert torch.equal(other(SPANS[2], 0), IndexedNoise({0: 8}, SHAPE)(SPANS[2], 0))


def test_a_stream_has_all_initial_noise_first_then_one_draw_per_step():
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(7, *SHAPE, generator=generator)
    draws = [torch.randn(n, *SHAPE, generator=generator) for n in (3, 3, 3, 3, 1, 1)]
    noise = StreamNoise(SPANS, [3, 3, 3], SHAPE, seed=5)
    for i, span in enumerate(SPANS):
        assert torch.equal(noise(span, 0)[0], start[span.first_frame : span.end].transpose(0, 1))
        for step in (1, 2):
            assert torch.equal(noise(span, step)[0], draws[2 * i + step - 1].transpose(0, 1))


def test_a_stream_skips_finished_chunks():
    whole, resumed = (StreamNoise(SPANS, [3, 3, 3], SHAPE, seed=5) for _ in range(2))
    for span in SPANS[:2]:
        for step in range(3):
            whole(span, step)
    assert torch.equal(whole(SPANS[2], 1), resumed(SPANS[2], 1))
    with pytest.raises(ValueError, match="past"):
        resumed(SPANS[0], 1)


def test_noise_from_a_file_is_used_in_the_same_order():
    start, renoise = torch.randn(7, *SHAPE), torch.randn(20, *SHAPE)
    noise = StreamNoise(SPANS, [2, 2, 2], SHAPE, start=start, renoise=renoise)
    assert torch.equal(noise(SPANS[1], 0)[0], start[3:6].transpose(0, 1))
    assert torch.equal(noise(SPANS[1], 1)[0], renoise[3:6].transpose(0, 1))
    with pytest.raises(ValueError, match=r"renoise .* is not \[7 or more"):
        StreamNoise(SPANS, [2, 2, 2], SHAPE, start=start, renoise=renoise[:6])
    with pytest.raises(ValueError, match="noise"):
        StreamNoise(SPANS, [2, 2, 2], (3, 4, 4), start=start)
