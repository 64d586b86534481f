"""Attention kernels are timed and compared with float32; what is wrong or broken is a line."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.test_memory import RAN_OUT
from wancli.cost.kernels import AttentionCase, rank_kernels, wrong_kernels
from wancli.doctor import kernels
from wancli.doctor.kernels import (
    MeasuredBackend,
    available_backends,
    describe,
    find_backend,
    measure_alignments,
    measure_kernels,
)

CPU = torch.device("cpu")
CASES = (AttentionCase(2, 64, 64), AttentionCase(2, 64, 96))


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SMALL_CASES", CASES)


def fast_and_wrong(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query


def not_finite(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.full_like(query, torch.nan)


def broken(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if key.shape[1] > 64:
        raise RuntimeError("no kernel image\nis available")
    return query


def blind_at_the_end(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention that misses the last keys, as a wrong tile would."""
    return native(query, key[:, :-4], value[:, :-4])


native = find_backend("native", CPU).attend


def test_wrong_and_broken_kernels_are_named_and_the_right_one_is_taken():
    backends = {
        "fast": fast_and_wrong, "nan": not_finite, "blind": blind_at_the_end, "broken": broken,
        "native": native,
    }  # fmt: skip
    table = measure_kernels(
        CPU, {name: MeasuredBackend(each) for name, each in backends.items()}, round_s=1e-4
    )
    assert [*rank_kernels(table.times, heads=2, tokens=64)] == ["native"]
    errors = {time.backend: time.error for time in table.times}
    assert errors["native"] < 1e-5
    assert errors["nan"] == 1.0
    lines = "\n".join(describe(table))
    wrong = wrong_kernels(table.times)
    assert {*wrong} == {"fast", "nan", "blind"}
    for name, error in wrong.items():
        assert f"{name}: {100 * error:.2g} % off float32" in lines
    assert "attention, broken: no kernel image\n" in lines + "\n"
    assert "attention, 2 heads, 64 tokens: native" in lines


def test_no_case_is_begun_after_the_budget():
    backends = {"native": MeasuredBackend(native)}
    assert measure_kernels(CPU, backends, budget_s=-1.0).times == []


@pytest.mark.parametrize("error", RAN_OUT)
def test_what_fits_is_measured_where_a_larger_case_runs_out_of_memory(
    monkeypatch: pytest.MonkeyPatch, error: Exception
):
    drawn = kernels._draw

    def draw(case: AttentionCase, *where: Any) -> Any:
        if case != CASES[0]:
            raise error
        return drawn(case, *where)

    monkeypatch.setattr(kernels, "_draw", draw)
    table = measure_kernels(CPU, {"native": MeasuredBackend(native)}, round_s=1e-4)
    assert [time.case for time in table.times] == [CASES[0]]
    assert measure_alignments(table.times, CASES[1], CPU, round_s=1e-4) == {}


def test_backends_that_run_here_are_found():
    names = [name for name, _ in available_backends(CPU)]
    assert {"native", "_native_math"} <= {*names}
    assert not {"sage", "_native_cudnn", "flash_hub", "flex"} & {*names}


def test_a_padding_that_is_wrong_or_does_not_run_is_left_out(monkeypatch: pytest.MonkeyPatch):
    def masked(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None) -> Tensor:
        if mask is not None and key.shape[1] == 264:  # 257 padded to a multiple of 8
            raise RuntimeError("no kernel takes this mask")
        visible = slice(None if mask is None or key.shape[1] == 320 else 257)  # 64: none is hidden
        return native(query, key[:, visible], value[:, visible])

    monkeypatch.setattr(kernels, "attend", masked)
    rounds = measure_alignments([], AttentionCase(2, 16, 512), CPU, round_s=1e-4)
    assert list(rounds) == [1, 128, 256]


def test_padding_is_timed_as_the_cache_pads():
    case = AttentionCase(2, 16, 512)
    rounds = measure_alignments([], case, CPU, round_s=1e-4)
    assert list(rounds) == [1, 8, 64, 128, 256]
    assert all(len(each) == kernels.ROUNDS for each in rounds.values())
    calls = kernels._aligned_calls(*kernels._draw(case, CPU, torch.float32))
    for call in calls.values():
        assert torch.allclose(call(), calls[1](), atol=1e-5)
