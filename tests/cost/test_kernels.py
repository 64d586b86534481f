"""The choice among measured attention kernels, and of the padding of the prompt's keys."""

from collections.abc import Mapping, Sequence

import pytest

from wancli.cost.kernels import (
    WORST_ERROR,
    AttentionCase,
    KernelTime,
    rank_kernels,
    tokens_to_align,
    wrong_kernels,
)

CHUNK, PROMPT = AttentionCase(12, 4680, 18_720), AttentionCase(12, 4680, 512)
CLIP = AttentionCase(40, 32_760, 32_760)


def table(
    times: Mapping[str, tuple[float, ...]],
    *,
    cases: tuple[AttentionCase, ...] = (CHUNK, PROMPT),
    **errors: float,
) -> list[KernelTime]:
    """Times of each backend, case by case."""
    return [
        KernelTime(name, case, seconds, errors.get(name, 0.003))
        for name, each in times.items()
        for case, seconds in zip(cases, each, strict=False)
    ]


def test_the_fastest_over_self_and_cross_attention_is_first():
    times = table({"one": (3.0, 1.0), "two": (2.0, 1.5), "three": (5.0, 0.1)})
    assert rank_kernels(times, heads=12, tokens=4680) == {"two": 3.5, "one": 4.0, "three": 5.1}


def test_a_fast_kernel_that_is_wrong_is_named_and_never_taken():
    times = table({"wrong": (0.1, 0.1), "right": (2.0, 2.0)}, wrong=2 * WORST_ERROR)
    assert [*rank_kernels(times, heads=12, tokens=4680)] == ["right"]
    assert wrong_kernels(times) == {"wrong": 2 * WORST_ERROR}


def test_a_kernel_that_is_wrong_in_one_case_is_taken_in_none():
    times = [*table({"odd": (1.0, 1.0), "right": (2.0, 2.0)}), KernelTime("odd", CLIP, 1.0, 1.0)]
    assert [*rank_kernels(times, heads=12, tokens=4680)] == ["right"]


def test_a_kernel_without_a_time_in_every_case_is_not_taken():
    times = table({"part": (0.1,), "whole": (2.0, 2.0)})
    assert [*rank_kernels(times, heads=12, tokens=4680)] == ["whole"]


@pytest.mark.parametrize(
    ("heads", "tokens", "best"),
    [(12, 1560, "chunks"), (40, 75_600, "clips"), (24, 30_000, "clips")],
)
def test_the_cases_most_like_the_request_decide(heads: int, tokens: int, best: str):
    times = table({"chunks": (1.0, 1.0), "clips": (2.0, 2.0)})
    times += table({"chunks": (2.0,), "clips": (1.0,)}, cases=(CLIP,))
    assert next(iter(rank_kernels(times, heads=heads, tokens=tokens))) == best


def test_nothing_is_known_without_times():
    assert rank_kernels([], heads=12, tokens=4680) == {}


@pytest.mark.parametrize(("choice", "tokens"), [("off", 1), ("1", 1), ("128", 128)])
def test_an_explicit_alignment_applies_whatever_was_measured(choice: str, tokens: int):
    assert tokens_to_align(choice, {1: [2.0], 8: [1.0]}) == tokens


@pytest.mark.parametrize(
    ("rounds", "tokens"),
    [
        ({}, 1),
        ({1: [1.0, 1.1], 8: [0.9, 1.05], 64: [0.8, 1.0]}, 1),  # within the noise
        ({1: [1.0, 1.1], 8: [0.9, 0.95], 64: [0.7, 0.8], 128: [0.8, 0.9]}, 64),
        ({1: [1.0, 1.1], 256: [1.2, 1.3]}, 1),
    ],
)
def test_auto_pads_only_where_that_is_faster_by_more_than_the_noise(
    rounds: Mapping[int, Sequence[float]], tokens: int
):
    assert tokens_to_align("auto", rounds) == tokens
