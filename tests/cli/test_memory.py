"""The flags --offload, --vae-tiling and --vae-dtype."""

import json
from pathlib import Path

import pytest

from tests.conftest import Wancli

TINY = ("--device", "cpu", "--steps", 2, "--seed", 1, "--guidance-scale", 2, "--num-frames", 5)


def clip(model: Path, size: str) -> tuple[object, ...]:
    return ("generate", "x", "--model", model, *TINY, "--size", size)


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (("--offload", "group", "--device", "cpu"), "--offload none"),
        (("--vae-tiling",), "--no-vae-tiling"),
        (("--vae-dtype", "float16", "--device", "cpu"), "--vae-dtype bfloat16"),
    ],
)
def test_incompatible_flags_are_rejected_before_anything_loads(wancli: Wancli, args, hint: str):
    for command in (("generate", "x"), ("plan",), ("rollout", "x", "--chunks", 2)):
        result = wancli(*command, *args)
        assert result.code == 2
        assert hint in result.err


def test_the_record_holds_the_requested_and_the_actual_offload(wancli: Wancli, tiny_model: Path):
    command = (*clip(tiny_model, "32x32"), "--json", "-o")
    record = json.loads(wancli(*command, "auto.mp4").out)
    assert record["memory"]["offload"] == "none"
    assert record["request"]["machine"]["offload"] == "auto"
    same = json.loads(wancli(*command, "none.mp4", "--offload", "none").out)
    assert same["hash"] == record["hash"]


def test_a_preset_can_set_offload(wancli: Wancli):
    Path("low.toml").write_text("[machine]\noffload = 'group'\ndevice = 'cpu'\n")
    assert "has them in RAM already" in wancli("plan", "--preset", "low.toml").err


@pytest.mark.slow
def test_vae_tiling_and_bfloat16_change_pixels_slightly(wancli: Wancli, tiny_model: Path):
    command = (*clip(tiny_model, "320x32"), "--lossless", "-q", "--overwrite")
    whole = wancli(*command, "-o", "whole.mp4", "--save-latents", "z.safetensors")
    assert whole.code == 0, whole.err
    decode = ("decode", "z.safetensors", "-o", "again.mp4", "--overwrite", "--json")
    for flag, *values in (("--vae-tiling",), ("--vae-dtype", "bfloat16")):
        result = wancli(*command, "-o", "less.mp4", flag, *values)
        assert result.code == 0, result.err
        comparison = json.loads(wancli("compare", "whole.mp4", "less.mp4", "--json").out)
        assert 0.9 < comparison["ssim"]["mean"] < 1
        again = json.loads(wancli(*decode, flag, *values).out)
        less = json.loads(Path("less.json").read_text())
        assert again["output"]["framemd5"] == less["output"]["framemd5"]
        setting = flag.removeprefix("--").replace("-", "_")
        assert again["request"]["machine"][setting] == less["request"]["machine"][setting]


def test_decode_rejects_tiling_of_a_single_tile(wancli: Wancli, tiny_model: Path):
    command = (*clip(tiny_model, "32x32"), "-o", "a.mp4", "-q")
    assert wancli(*command, "--save-latents", "z.safetensors").code == 0
    result = wancli("decode", "z.safetensors", "-o", "b.mp4", "--vae-tiling")
    assert (result.code, "--no-vae-tiling" in result.err) == (2, True)


def test_a_rollout_can_decode_with_a_bfloat16_vae(wancli: Wancli, tiny_model: Path):
    small = ("--model", tiny_model, "--device", "cpu", "--chunks", 2, "--size", "32x32")
    result = wancli("rollout", "x", *small, "--vae-dtype", "bfloat16")
    assert result.code == 0, result.err
