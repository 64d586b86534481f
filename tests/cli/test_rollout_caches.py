"""The step cache in rollouts of many steps a chunk, through main()."""

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
    said = wancli(
        "rollout", "a red circle", "--model", model, *SMALL, *flags, "-o", "a.mp4",
        "--save-latents", "z.safetensors", "--overwrite", "--force", "--json", "-q",
    )  # fmt: skip
    assert said.code == 0, said.err
    return json.loads(said.out), load_file("z.safetensors")["latents"]


def test_a_step_cache_that_never_fires_changes_no_bit_of_a_rollout(wancli: Wancli, model: Path):
    _, whole = roll(wancli, model, "--chunks", 3)
    never = (*CACHED, "--cachedit-residual-threshold", 1e-9)
    record, same = roll(wancli, model, "--chunks", 3, *never)
    assert torch.equal(whole, same)
    assert record["cache"]["reused"] == 0


def test_every_chunk_reuses_steps_of_its_own(wancli: Wancli, model: Path):
    record, _ = roll(wancli, model, "--chunks", 3, *OFTEN)
    rows = [row["reuse"] for row in record["timings"]["chunks"]]
    assert [row["forwards"] for row in rows] == [20] * 3
    assert all(row["reused"] > 0 for row in rows)
    assert rows[0] == rows[1] == rows[2]
    assert record["cache"] == {
        "method": "cachedit", **{key: 3 * value for key, value in rows[0].items()}
    }  # fmt: skip


def test_the_first_chunk_is_that_of_a_shorter_rollout(wancli: Wancli, model: Path):
    _, short = roll(wancli, model, "--chunks", 1, *OFTEN)
    _, long = roll(wancli, model, "--chunks", 3, *OFTEN)
    assert torch.equal(short, long[:1])


def test_a_cached_rollout_that_is_extended_is_the_one_made_at_once(wancli: Wancli, model: Path):
    _, once = roll(wancli, model, "--chunks", 3, *OFTEN)
    roll(wancli, model, "--chunks", 2, *OFTEN)
    said = wancli(
        "rollout", "--resume", "--chunks", 3, "-o", "a.mp4", "--save-latents", "z.safetensors",
        "--overwrite", "--force", "-q",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert torch.equal(once, load_file("z.safetensors")["latents"])
