"""The caches of `wancli generate`, through main(), on tiny real models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.cli.test_bad_input import complaint
from tests.conftest import Made, Wancli
from wancli.video.read import read_comment

SMALL: tuple[object, ...] = ("--steps", 12, "--frames", 5, "--size", "32x32", "--device", "cpu")
SMALL += ("--guidance-scale", 3, "--flow-shift", 1)  # each expert runs half of the steps
CACHED = ("--use-cachedit", "--cachedit-fn", 1, "--cachedit-max-warmup-steps", 2)
OFTEN = (*CACHED, "--cachedit-residual-threshold", 1)


def arguments(model: Path, *flags: object) -> tuple[object, ...]:
    return (
        "generate", "a red circle", "--model", model, *SMALL, "--seed", 1, *flags, "-o", "a.mp4",
        "--overwrite", "--save-latents", "z.safetensors", "--json", "-q",
    )  # fmt: skip


def make(wancli: Wancli, model: Path, *flags: object) -> tuple[dict[str, Any], Tensor]:
    """The record and the latents of one generation."""
    result = wancli(*arguments(model, *flags))
    assert result.code == 0, result.err
    return json.loads(result.out), load_file("z.safetensors")["latents"]


def plain(made: Made, model: Path) -> tuple[dict[str, Any], Tensor]:
    """The same without flags, which runs once for all tests."""
    made(*arguments(model))
    return json.loads(Path("a.json").read_text()), load_file("z.safetensors")["latents"]


def test_caching_prompt_kv_changes_no_bit(wancli: Wancli, made: Made, experts: Path):
    others = (("--no-prompt-kv",), ("--free-kv-weights",))
    runs = [plain(made, experts), *(make(wancli, experts, *flags) for flags in others)]
    records = [record for record, _ in runs]
    assert all(torch.equal(latents, runs[0][1]) for _, latents in runs)
    assert len({record["hash"] for record in records}) == 1  # it is the same video
    assert "cache" not in records[0]
    assert [record["memory"]["prompt_kv_gib"] > 0 for record in records] == [True, False, True]
    assert [record["memory"]["freed_weights_gib"] > 0 for record in records] == [False, False, True]


def test_padding_prompt_kv_differs_only_by_rounding(wancli: Wancli, made: Made, tiny_model: Path):
    _, latents = plain(made, tiny_model)
    assert torch.equal(make(wancli, tiny_model, "--kv-align", 1)[1], latents)
    _, padded = make(wancli, tiny_model, "--kv-align", 64)
    assert (latents - padded).abs().max() < 1e-4


def test_a_step_cache_that_never_triggers_changes_no_bit_and_warns(
    wancli: Wancli, made: Made, tiny_model: Path
):
    _, latents = plain(made, tiny_model)
    command = arguments(tiny_model, *CACHED, "--cachedit-residual-threshold", 1e-9)
    result = wancli(*command[:-1])  # without --quiet
    assert json.loads(result.out)["cache"]["reused"] == 0
    assert torch.equal(latents, load_file("z.safetensors")["latents"])
    text = " ".join(result.err.split())
    assert "warn: cachedit: nothing was reused. hint: a higher threshold" in text
    assert "or a lower --cachedit-max-warmup-steps" in text


def test_the_record_lists_what_each_forward_computed(wancli: Wancli, experts: Path):
    record, _ = make(wancli, experts, *OFTEN)
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


def test_videos_of_one_process_are_independent(wancli: Wancli, tiny_model: Path):
    _, alone = make(wancli, tiny_model, *OFTEN, "--seed", 2)
    result = wancli(
        "generate", "a red circle", "--model", tiny_model, *SMALL, *OFTEN, "--seed", "1,2",
        "-o", "b.mp4", "--save-latents", "z-{seed}.safetensors",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert torch.equal(load_file("z-2.safetensors")["latents"], alone)


def test_uncond_forwards_are_skipped_after_the_gate(wancli: Wancli, made: Made, tiny_model: Path):
    _, whole = plain(made, tiny_model)
    record, gated = make(wancli, tiny_model, "--cfg-gate", 0.75)
    skipped = [use["step"] for use in record["timings"]["uses"] if not use["blocks"]]
    assert skipped == [9, 10, 11]
    assert record["timings"]["forwards"] == [2] * 9 + [1] * 3
    assert not torch.equal(whole, gated)
    assert (whole - gated).abs().max() < whole.abs().max()


def test_the_gate_and_a_step_cache_work_together(wancli: Wancli, experts: Path):
    record, _ = make(wancli, experts, *OFTEN, "--cfg-gate", 6)
    assert record["cache"]["method"] == "cachedit and cfg-gate 6"
    uses = {(use["step"], use["branch"]): use for use in record["timings"]["uses"]}
    assert all(uses[step, "uncond"]["blocks"] == 0 for step in range(9, 12))
    assert any(uses[step, "cond"]["reused"] for step in range(6, 12))


def test_the_step_table_shows_reuse(wancli: Wancli, tiny_model: Path):
    flags = (*OFTEN, "--cfg-gate", 10, "-v")
    result = wancli(
        "generate", "a red circle", "--model", tiny_model, *SMALL, *flags, "-o", "c.mp4"
    )
    assert result.code == 0, result.err
    header = next(line for line in result.err.splitlines() if line.startswith("step"))
    assert header.split() == ["step", "sigma", "cond", "uncond", "ms", "share"]
    assert "computed 2/2" in result.err
    assert "reused 1/2" in result.err
    assert "skipped 0/2" in result.err
    assert "forwards reused" in result.err


def test_a_preset_tuned_for_another_dtype_is_rejected_before_loading(
    wancli: Wancli, tiny_model: Path
):
    tables = '[step_cache]\nstep_cache = "cachedit"\ncachedit_fn = 1\n[tuned_for]\n'
    Path("there.toml").write_text(tables + '"machine.dtype" = "bfloat16"\n')
    Path("here.toml").write_text(tables + '"machine.dtype" = "float32"\n')
    command = ("generate", "a red circle", "--model", tiny_model, *SMALL, "-o", "d.mp4")
    result = wancli(*command, "--cachedit-preset", "there.toml", "-q")
    assert result.code == 2
    assert (
        complaint(result)[0] == "this step cache was tuned for machine.dtype bfloat16, not float32."
    )
    assert wancli(*command, "--cachedit-preset", "here.toml", "-q").code == 0


def test_a_missing_cache_dit_is_reported_before_anything_loads(
    wancli: Wancli, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("wancli.utils.packages.package_version", lambda _: "")
    result = wancli("generate", "a red circle", "--use-cachedit")
    assert result.code == 4
    assert complaint(result)[1].startswith("pip install 'cache-dit>=1.5.3'")


def test_an_attention_backend_is_used_or_reported_missing(
    wancli: Wancli, made: Made, tiny_model: Path
):
    _, baseline = plain(made, tiny_model)
    _, native = make(wancli, tiny_model, "--attention-backend", "native")
    assert torch.equal(baseline, native)
    result = wancli(
        "generate", "a red circle", "--model", tiny_model, *SMALL, "-q", "-o", "e.mp4",
        "--attention-backend", "nosuch",
    )  # fmt: skip
    assert result.code == 4
    assert "--attention-backend nosuch" in result.err
