"""Planning of a batch: which jobs share a loaded model."""

from dataclasses import dataclass
from typing import Any

import pytest

from wancli.batches.plan import _Checked, _grouped
from wancli.catalog.specs import SPECS
from wancli.planning.jobs import JobSettings


@dataclass
class FakeEstimate:
    offload: str
    possible: tuple[str, ...] = ("none", "model", "group")


def grouped(*estimates: FakeEstimate | None, auto: bool = True) -> list[tuple[int, Any]]:
    settings = [JobSettings("generate", {"steps": n}, n) for n in range(len(estimates))]
    made: list[Any] = list(estimates)
    checked = [
        _Checked(s.values, "demo", {}, e, auto, SPECS["demo"])
        for s, e in zip(settings, made, strict=True)
    ]
    return [(one.model, one.values.get("offload")) for one in _grouped(settings, checked)]


@pytest.mark.parametrize(
    ("estimates", "expected"),
    [
        ([FakeEstimate("none"), FakeEstimate("group")], [(0, "group"), (0, "group")]),
        ([FakeEstimate("none", ("none",)), FakeEstimate("model")], [(0, "none"), (1, "model")]),
        ([None, None], [(0, None), (0, None)]),  # of a model that is not downloaded
    ],
)
def test_a_model_is_offloaded_as_its_most_demanding_video_needs(
    estimates: list[FakeEstimate | None], expected: list[tuple[int, str | None]]
):
    assert grouped(*estimates) == expected


def test_a_mode_of_offload_that_is_set_stays():
    assert grouped(FakeEstimate("none"), FakeEstimate("group"), auto=False) == [(0, None)] * 2
