"""Step caches in rollouts of many steps a chunk, through main()."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.cli.test_generate_caches import CACHED, OFTEN
from tests.conftest import Wancli

SMALL: tuple[object, ...] = ("--sampler", "unipc", "--steps", 10, "--size", "32x32", "--seed", 1)
SMALL += ("--guidance-scale", 3, "--flow-shift", 1, "--chunk-frames", 1, "--device", "cpu")


def roll(wancli: Wancli, model: Path, *flags: object) -> tuple[dict[str, Any], Tensor]:
    """The record and the latents of one rollout."""
    result = wancli(
        "rollout", "a red circle", "--model", model, *SMALL, *flags, "-o", "a.mp4",
        "--save-latents", "z.safetensors", "--overwrite", "--force", "--json", "-q",
    )  # fmt: skip
    assert result.code == 0, result.err
    return json.loads(result.out), load_file("z.safetensors")["latents"]


def test_a_step_cache_that_never_triggers_changes_no_bit_of_a_rollout(
    wancli: Wancli, tiny_model: Path
):
    _, whole = roll(wancli, tiny_model, "--chunks", 3)
    never = (*CACHED, "--cachedit-residual-threshold", 1e-9)
    record, same = roll(wancli, tiny_model, "--chunks", 3, *never)
    assert torch.equal(whole, same)
    assert record["cache"]["reused"] == 0


def test_each_chunk_reuses_its_own_steps_in_shorter_and_extended_rollouts_too(
    wancli: Wancli, experts: Path
):
    record, once = roll(wancli, experts, "--chunks", 3, *OFTEN)
    rows = [row["reuse"] for row in record["timings"]["chunks"]]
    assert [row["forwards"] for row in rows] == [20] * 3
    assert all(row["reused"] > 0 for row in rows)
    assert rows[0] == rows[1] == rows[2]
    assert record["cache"] == {
        "method": "cachedit", **{key: 3 * value for key, value in rows[0].items()}
    }  # fmt: skip
    _, shorter = roll(wancli, experts, "--chunks", 2, *OFTEN)
    assert torch.equal(shorter, once[:2])
    result = wancli(
        "rollout", "--resume", "--chunks", 3, "-o", "a.mp4", "--save-latents", "z.safetensors",
        "--overwrite", "--force", "-q",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert torch.equal(once, load_file("z.safetensors")["latents"])
