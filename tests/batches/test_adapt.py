"""Settings that need less memory, as the hints of a plan name them."""

from collections.abc import Sequence
from typing import Any

import pytest

from wancli.batches.adapt import less_memory
from wancli.cost.devices import Device


def steps(values: dict[str, Any]) -> list[dict[str, Any]]:
    """All changes, one after the other, until there is none."""
    made: list[dict[str, Any]] = []
    while change := less_memory("generate", "a circle", {**values, **_all(made)}):
        made.append(change)
        assert len(made) < 20
    return made


def _all(changes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for change in changes for name, value in change.items()}


def test_a_cpu_has_smaller_dtypes_and_no_offload():
    assert steps({"model": "demo"})[0] == {"dtype": "bfloat16"}
    assert less_memory("generate", "a circle", {"model": "demo", "steps": 0}) == {}


def test_no_job_changes_to_a_tiny_decoder_by_itself():
    least = {"dtype": "bfloat16", "vae_dtype": "bfloat16", "quantize": "int8"}
    assert less_memory("rollout", "a circle", {"model": "demo", **least}) == {}


def test_weights_wait_in_ram_before_anything_is_rounded(monkeypatch: pytest.MonkeyPatch):
    gpu = Device("cuda", "GPU", 24 * 2**30, 24 * 2**30)
    monkeypatch.setattr("wancli.cost.estimate.find_device", lambda machine: gpu)
    values = {"model": "wan2.1-t2v-1.3b", "offload": "none"}
    changes = [value for change in steps(values) for value in change.values()]
    assert changes == ["model", "group", "sequential", True]  # the last is of `vae_tiling`
