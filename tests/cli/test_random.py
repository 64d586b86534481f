"""`--model random:NAME` through the commands: no files needed, the same weights every time."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Wancli
from wancli.cost.devices import find_cpu

SMALL = ("--seed", 1, "--steps", 2, "--num-frames", 5, "--size", "32x32")
DEMO = ("--model", "random:demo", *SMALL)


def record_of(wancli: Wancli, *more: object) -> dict[str, Any]:
    result = wancli("generate", "a cat", *DEMO, "--json", "--overwrite", "-o", "a.mp4", *more)
    assert result.code == 0, result.err
    record: dict[str, Any] = json.loads(result.out)
    return record


def test_a_random_model_is_reproducible_and_fewer_layers_change_request_and_video(wancli: Wancli):
    whole, two = record_of(wancli), record_of(wancli, "--layers", 2)
    assert whole["request"]["model_revision"] == "random:demo layers=8"
    assert whole["request"]["sampling"]["guidance_scale"] == 2.5  # from the demo's preset
    assert two["request"]["machine"]["layers"] == 2
    assert two["request"]["model_revision"] == "random:demo layers=2"
    assert whole["hash"] != two["hash"]
    assert whole["output"]["framemd5"] != two["output"]["framemd5"]
    result = wancli("repro", "a.mp4", "-o", "b.mp4")
    assert "identical" in result.err, result.err


def test_saved_latents_decode_to_the_same_video(wancli: Wancli):
    record = record_of(wancli, "--layers", 1, "--save-latents", "z.safetensors")
    result = wancli("decode", "z.safetensors", "-o", "b.mp4", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["output"]["framemd5"] == record["output"]["framemd5"]


def test_a_random_model_rolls_out(wancli: Wancli):
    run = ("--model", "random:demo", "--layers", 2, "--size", "32x32", "--steps", 2, "--seed", 1)
    result = wancli("rollout", "a cat", *run, "--chunks", 2, "--json", "-o", "a.mp4")
    assert result.code == 0, result.err
    assert json.loads(result.out)["request"]["model_revision"] == "random:demo layers=2"


def test_a_bench_takes_a_random_model(wancli: Wancli):
    run = ("bench", "a cat", *DEMO[:2], *SMALL[2:], "--layers", 2, "--output", "b", "--json")
    result = wancli(*run, "--variant", "fast: --cfg-gate 0.5")
    assert result.code == 0, result.err
    assert Path("b/report.html").is_file()


def test_plan_and_model_info_agree(wancli: Wancli):
    name = "random:wan2.2-t2v-a14b"
    info = json.loads(wancli("model", "info", name, "--json").out)
    plan = json.loads(wancli("plan", "--model", name, "--force", "--json").out)
    parts = {part["name"]: part["parameters"] for part in info["parts"]}
    assert parts == plan["cost"]["parameters"]
    assert info["folder"] is None
    assert not plan["cost"]["downloads"]
    text = wancli("model", "info", name).out
    assert "34,384,786,035" in text
    assert "folder" not in text
    assert "download" not in wancli("plan", "--model", "random:demo").out


@pytest.mark.parametrize(
    ("more", "gib"), [((), 75), (("--layers", 1, "--size", "64x64", "--num-frames", 5), 5)]
)
def test_a_model_that_does_not_fit_is_rejected_before_it_is_created(
    wancli: Wancli, more: Any, gib: int
):
    run = ("--model", "random:wan2.1-t2v-14b", "--device", "cpu", *more)
    plan = json.loads(wancli("plan", *run, "--force", "--json").out)
    needed = plan["cost"]["resident"]["none"]
    assert needed > gib * 2**30
    result = wancli("generate", "a cat", *run, "--dry-run")
    assert result.code == (5 if needed > find_cpu().total else 0)


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("generate", "x", "--model", "random:wan2.1-t2v-13b"), 4, "'random:wan2.1-t2v-1.3b'"),
        (("generate", "x", "--model", "demo", "--layers", 2), 2, "--model random:demo"),
        (("rollout", "x", "--model", "demo", "--layers", 2), 2, "--model random:demo"),
        (("bench", "x", "--layers", 2), 2, "--model random:demo"),
        (("model", "pull", "random:demo"), 2, "its weights are random"),
        (("model", "path", "random:demo"), 2, "its weights are random"),
        (("model", "rm", "random:demo"), 2, "its weights are random"),
        (("generate", "x", "--model", "random:demo", "--lora", "no.safetensors"), 4, "not found"),
    ],
)
def test_impossible_requests_are_one_line_errors(wancli: Wancli, args: Any, code: int, words: str):
    result = wancli(*args)
    assert result.code == code
    assert words in result.err
    assert "Traceback" not in result.err


@pytest.mark.slow
def test_a_released_model_is_created_at_its_real_width(wancli: Wancli):
    run = ("--model", "random:wan2.1-t2v-1.3b", "--layers", 1, "--dtype", "bfloat16")
    small = ("--steps", 1, "--num-frames", 5, "--size", "64x64", "--device", "cpu")
    result = wancli("generate", "a cat", *run, *small, "--json", "-o", "a.mp4")
    assert result.code == 0, result.err
    assert json.loads(result.out)["request"]["video"]["fps"] == 16
