"""--offload, --vae-tiling and --vae-dtype, as a shell calls them."""

import json
from pathlib import Path

import pytest

from tests.conftest import Wancli

TINY = ("--device", "cpu", "--steps", 2, "--seed", 1, "--guidance-scale", 2, "--num-frames", 5)


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (("--offload", "group", "--device", "cpu"), "--offload none"),
        (("--vae-tiling",), "--no-vae-tiling"),
        (("--vae-dtype", "float16", "--device", "cpu"), "--vae-dtype bfloat16"),
    ],
)
def test_what_does_not_go_together_is_refused_before_it_loads(wancli: Wancli, args, hint: str):
    for command in (("generate", "x"), ("plan",), ("rollout", "x", "--chunks", 2)):
        said = wancli(*command, *args)
        assert said.code == 2
        assert hint in said.err


def test_a_record_says_how_it_was_offloaded_and_what_was_asked(wancli: Wancli, tiny_model: Path):
    made = ("generate", "x", "--model", tiny_model, *TINY, "--size", "32x32", "--json", "-o")
    told = json.loads(wancli(*made, "auto.mp4").out)
    assert told["memory"]["offload"] == "none"
    assert told["request"]["machine"]["offload"] == "auto"
    same = json.loads(wancli(*made, "none.mp4", "--offload", "none").out)
    assert same["hash"] == told["hash"]


def test_a_preset_may_say_it(wancli: Wancli):
    Path("low.toml").write_text("[machine]\noffload = 'group'\ndevice = 'cpu'\n")
    assert "is the RAM itself" in wancli("plan", "--preset", "low.toml").err


@pytest.mark.parametrize("flags", [("--vae-tiling",), ("--vae-dtype", "bfloat16")])
def test_tiles_and_narrow_numbers_change_pixels_a_little(wancli: Wancli, tiny_model: Path, flags):
    made = ("generate", "x", "--model", tiny_model, *TINY, "--size", "320x64", "--lossless", "-q")
    for name, more in (("whole.mp4", ("--save-latents", "z.safetensors")), ("less.mp4", flags)):
        said = wancli(*made, "-o", name, *more)
        assert said.code == 0, said.err
    told = json.loads(wancli("compare", "whole.mp4", "less.mp4", "--json").out)
    assert 0.9 < told["ssim"]["mean"] < 1
    again = json.loads(wancli("decode", "z.safetensors", "-o", "again.mp4", "--json", *flags).out)
    less = json.loads(Path("less.json").read_text())
    assert again["output"]["framemd5"] == less["output"]["framemd5"]
    setting = flags[0].removeprefix("--").replace("-", "_")
    assert again["request"]["machine"][setting] == less["request"]["machine"][setting]


def test_latents_of_one_tile_are_not_decoded_in_tiles(wancli: Wancli, tiny_model: Path):
    made = ("generate", "x", "--model", tiny_model, *TINY, "--size", "32x32", "-o", "a.mp4", "-q")
    assert wancli(*made, "--save-latents", "z.safetensors").code == 0
    said = wancli("decode", "z.safetensors", "-o", "b.mp4", "--vae-tiling")
    assert (said.code, "--no-vae-tiling" in said.err) == (2, True)


def test_a_rollout_decodes_with_a_narrow_vae(wancli: Wancli):
    said = wancli("rollout", "x", "--chunks", 2, "--device", "cpu", "--vae-dtype", "bfloat16")
    assert said.code == 0, said.err


def test_a_bench_that_cannot_fit_is_refused_before_it_loads(wancli: Wancli):
    huge = ("--size", "16384x16384", "--num-frames", 4001, "--device", "cpu")
    said = wancli("bench", "x", "--variant", "exact: --no-prompt-kv", *huge)
    assert said.code == 5
    assert "--force" in said.err
    assert not Path("bench").exists()
