"""The demo's distilled LoRA, in the package: clips, rollouts, what a plan says, and `repro`."""

import json
from typing import Any

import pytest

from tests.cli.test_bad_input import complaint
from tests.conftest import Wancli

PROMPT = "a red circle moving right on a black background"
FOUR = ("--preset", "demo-4step", "--seed", 1, "--vae-decoder", "tiny")


def run_json(wancli: Wancli, *args: object) -> Any:
    result = wancli(*args, "--json", "-q")
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_a_clip_takes_four_forwards_and_is_made_again_from_its_record(wancli: Wancli):
    made = run_json(wancli, "generate", PROMPT, *FOUR, "--num-frames", 5, "-o", "x.mp4")
    assert made["timings"]["forwards"] == [1, 1, 1, 1]
    (lora,) = made["lora"]
    assert (lora["name"], lora["dropped"]) == ("demo-4step.safetensors", {})
    assert lora["applied"] == lora["keys"]
    assert run_json(wancli, "model", "info", "demo-4step")["preset"] == "demo-4step"
    again = run_json(wancli, "repro", "x.mp4", "-o", "again.mp4")
    assert again["output"]["framemd5"] == made["output"]["framemd5"]


def test_a_rollout_goes_on_from_its_own_chunks(wancli: Wancli):
    part = run_json(wancli, "rollout", PROMPT, *FOUR, "--chunks", 1, "-o", "long.mp4")
    whole = run_json(wancli, "rollout", PROMPT, *FOUR, "--chunks", 2, "-o", "whole.mp4")
    longer = run_json(wancli, "rollout", "--resume", "--chunks", 2, "-o", "long.mp4")
    assert part["output"]["frames"] < whole["output"]["frames"]
    assert longer["output"]["framemd5"] == whole["output"]["framemd5"]


@pytest.mark.parametrize(
    ("flags", "error", "hint"),
    [
        (("--sampler", "euler", "--guidance-scale", 2), "without guidance", "--guidance-scale 1"),
        (("--use-cachedit",), "4 listed steps", "--step-cache none"),
    ],
)
def test_what_the_lora_was_not_distilled_for_is_refused(
    wancli: Wancli, flags: tuple[object, ...], error: str, hint: str
):
    result = wancli("generate", PROMPT, *FOUR, *flags, "--dry-run")
    message, advice = complaint(result)
    assert result.code == 2
    assert error in message
    assert hint in advice
