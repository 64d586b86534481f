"""The caches of `wancli generate`, through main(), on tiny real models of one and two experts."""

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.cli.test_bad_input import complaint
from tests.conftest import Wancli
from wancli.utils import packages
from wancli.video.read import read_comment

SMALL: tuple[object, ...] = ("--steps", 12, "--frames", 5, "--size", "32x32", "--device", "cpu")
SMALL += ("--guidance-scale", 3, "--flow-shift", 1)  # half of the steps for each expert
CACHED = ("--use-cachedit", "--cachedit-fn", 1, "--cachedit-max-warmup-steps", 2)
OFTEN = (*CACHED, "--cachedit-residual-threshold", 1)


def make(wancli: Wancli, model: Path, *flags: object) -> tuple[dict[str, Any], Tensor]:
    """The record and the latents of one generation."""
    said = wancli(
        "generate", "a red circle", "--model", model, *SMALL, "--seed", 1, *flags, "-o", "a.mp4",
        "--overwrite", "--save-latents", "z.safetensors", "--json", "-q",
    )  # fmt: skip
    assert said.code == 0, said.err
    return json.loads(said.out), load_file("z.safetensors")["latents"]


@pytest.mark.parametrize("flags", [("--no-prompt-kv",), ("--free-kv-weights",)])
def test_the_prompt_computed_once_changes_no_bit(wancli: Wancli, model: Path, flags: Any):
    usual, latents = make(wancli, model)
    other, same = make(wancli, model, *flags)
    assert torch.equal(latents, same)
    assert usual["hash"] == other["hash"]  # it is the same video
    assert "cache" not in usual
    kept = [record["memory"]["prompt_kv_gib"] > 0 for record in (usual, other)]
    freed = [record["memory"]["freed_weights_gib"] > 0 for record in (usual, other)]
    assert kept == [True, flags != ("--no-prompt-kv",)]
    assert freed == [False, flags == ("--free-kv-weights",)]


def test_the_padded_prompt_differs_by_rounding_alone(wancli: Wancli, model: Path):
    _, latents = make(wancli, model)
    assert torch.equal(make(wancli, model, "--kv-align", 1)[1], latents)
    _, padded = make(wancli, model, "--kv-align", 64)
    assert (latents - padded).abs().max() < 1e-4


def test_a_step_cache_that_never_fires_changes_no_bit_and_says_so(wancli: Wancli, model: Path):
    _, latents = make(wancli, model)
    never = (*CACHED, "--cachedit-residual-threshold", 1e-9)
    record, same = make(wancli, model, *never)
    assert torch.equal(latents, same)
    assert record["cache"]["reused"] == 0
    said = wancli("generate", "a red circle", "--model", model, *SMALL, *never, "-o", "b.mp4")
    assert "warn: cachedit: nothing was reused" in " ".join(said.err.split())


def test_the_record_says_of_every_forward_what_was_computed(wancli: Wancli, model: Path):
    record, _ = make(wancli, model, *OFTEN)
    uses = record["timings"]["uses"]
    assert [(use["step"], use["branch"]) for use in uses] == [
        (step, branch) for step in range(12) for branch in ("cond", "uncond")
    ]
    assert {use["blocks"] for use in uses if use["reused"]} == {1}
    assert {use["blocks"] for use in uses if not use["reused"]} == {2}
    reused = sum(use["reused"] for use in uses)
    assert record["cache"] == {
        "method": "cachedit", "forwards": 24, "reused": reused, "blocks": 48 - reused,
        "blocks_all": 48,
    }  # fmt: skip
    assert reused > 0
    assert "uses" not in json.loads(read_comment(Path("a.mp4")) or "")["timings"]


def test_two_videos_of_one_process_know_nothing_of_each_other(wancli: Wancli, model: Path):
    _, alone = make(wancli, model, *OFTEN, "--seed", 2)
    said = wancli(
        "generate", "a red circle", "--model", model, *SMALL, *OFTEN, "--seed", "1,2",
        "-o", "b.mp4", "--save-latents", "z-{seed}.safetensors",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert torch.equal(load_file("z-2.safetensors")["latents"], alone)


def test_after_the_gate_no_uncond_forward_is_made(wancli: Wancli, model: Path):
    _, whole = make(wancli, model)
    record, gated = make(wancli, model, "--cfg-gate", 0.75)
    skipped = [use["step"] for use in record["timings"]["uses"] if not use["blocks"]]
    assert skipped == [9, 10, 11]
    assert record["timings"]["forwards"] == [2] * 9 + [1] * 3
    assert not torch.equal(whole, gated)
    assert (whole - gated).abs().max() < whole.abs().max()


def test_the_gate_and_the_step_cache_go_together(wancli: Wancli, model: Path):
    record, _ = make(wancli, model, *OFTEN, "--cfg-gate", 6)
    assert record["cache"]["method"] == "cachedit and cfg-gate 6"
    uses = {(use["step"], use["branch"]): use for use in record["timings"]["uses"]}
    assert all(uses[step, "uncond"]["blocks"] == 0 for step in range(9, 12))
    assert any(uses[step, "cond"]["reused"] for step in range(6, 12))


def test_the_table_of_steps_says_what_was_reused(wancli: Wancli, model: Path):
    flags = (*OFTEN, "--cfg-gate", 10)
    said = wancli("generate", "a red circle", "--model", model, *SMALL, *flags, "-o", "c.mp4")
    assert said.code == 0, said.err
    header = next(line for line in said.err.splitlines() if line.startswith("step"))
    assert header.split() == ["step", "sigma", "cond", "uncond", "ms", "share"]
    assert "computed 2/2" in said.err
    assert "reused 1/2" in said.err
    assert "skipped 0/2" in said.err
    assert "forwards reused" in said.err


def test_a_preset_tuned_on_another_kind_of_machine_is_refused_before_loading(
    wancli: Wancli, model: Path
):
    tables = '[step_cache]\nstep_cache = "cachedit"\ncachedit_fn = 1\n[tuned_for]\n'
    Path("there.toml").write_text(tables + '"machine.dtype" = "bfloat16"\n')
    Path("here.toml").write_text(tables + '"machine.dtype" = "float32"\n')
    made = ("generate", "a red circle", "--model", model, *SMALL, "-o", "d.mp4")
    said = wancli(*made, "--cachedit-preset", "there.toml", "-q")
    assert said.code == 2
    assert (
        complaint(said)[0] == "this step cache was tuned for machine.dtype bfloat16, not float32."
    )
    assert wancli(*made, "--cachedit-preset", "here.toml", "-q").code == 0


@pytest.mark.parametrize("found", [None, "1.4.9"])
def test_a_missing_or_old_cache_dit_is_said_before_anything_loads(
    wancli: Wancli, monkeypatch: pytest.MonkeyPatch, found: str | None
):
    def version(_name: str) -> str:
        if found is None:
            raise PackageNotFoundError
        return found

    monkeypatch.setattr(packages, "version", version)
    said = wancli("generate", "a red circle", "--use-cachedit")
    assert said.code == 4
    assert complaint(said)[1].startswith("pip install 'cache-dit>=1.5.3'")


def test_an_attention_backend_is_used_or_said_to_be_missing(wancli: Wancli, model: Path):
    _, usual = make(wancli, model)
    _, native = make(wancli, model, "--attention-backend", "native")
    assert torch.equal(usual, native)
    said = wancli(
        "generate", "a red circle", "--model", model, *SMALL, "-q", "-o", "e.mp4",
        "--attention-backend", "nosuch",
    )  # fmt: skip
    assert said.code == 4
    assert "--attention-backend nosuch" in said.err
