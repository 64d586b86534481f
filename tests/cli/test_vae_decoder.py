"""The flag --vae-decoder: frames of a tiny decoder, in every command that decodes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import Wancli
from wancli.catalog.decoder_files import DEMO_DECODER
from wancli.catalog.specs import DEMO_FOLDER
from wancli.catalog.tiny_decoder import TinyDecoderShape
from wancli.models.random_weights import fill
from wancli.models.tiny_decoder import TinyDecoder

SMALL = ("--device", "cpu", "--size", "32x32", "--guidance-scale", 1, "--seed", 1, "--lossless")
RANDOM = ("--model", "random:wan2.1-t2v-1.3b", "--layers", 1)
CLIP = (*SMALL, "--steps", 1, "--num-frames", 5)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random one for the latents of the tiny model."""
    model = TinyDecoder(TinyDecoderShape(4, widths=(4, 4, 4, 4), blocks=1))
    fill(model, seed=0)
    path = tmp_path_factory.mktemp("decoder") / "small.safetensors"
    save_file(model.state_dict(), path)
    return path


def made(wancli: Wancli, *command: object) -> dict[str, Any]:
    result = wancli(*command, "--json")
    assert result.code == 0, result.err
    record: dict[str, Any] = json.loads(result.out)
    return record


def frames(record: dict[str, Any]) -> str:
    return str(record["output"]["framemd5"])


def test_a_clip_is_decoded_repeated_and_decoded_exactly_again(
    wancli: Wancli, tiny_model: Path, decoder: Path
):
    clip = ("generate", "x", "--model", tiny_model, *CLIP)
    tiny = made(
        wancli, *clip, "-o", "a.mp4", "--vae-decoder", decoder, "--save-latents", "z.safetensors"
    )
    assert tiny["env"]["vae_decoder"] == "tiny float32"
    assert [entry["part"] for entry in tiny["request"]["weights"]] == ["vae_decoder"]
    exact = made(wancli, *clip, "-o", "b.mp4")
    assert "weights" not in exact["request"]
    assert exact["hash"] != tiny["hash"]
    assert frames(exact) != frames(tiny)
    again = made(wancli, "repro", "a.json", "-o", "c.mp4")
    assert (again["hash"], frames(again)) == (tiny["hash"], frames(tiny))
    decoded = made(wancli, "decode", "z.safetensors", "-o", "d.mp4")
    assert frames(decoded) == frames(tiny)
    decoded = made(wancli, "decode", "z.safetensors", "-o", "e.mp4", "--vae-decoder", "exact")
    assert frames(decoded) == frames(exact)
    assert "weights" not in decoded["request"]
    embedded = json.loads(wancli("show", "a.mp4", "--json").out)["request"]
    assert embedded["machine"]["vae_decoder"] == decoder.name


def test_the_demos_is_found_again_by_name_from_the_video_alone(wancli: Wancli):
    flags = ("--steps", 1, "--num-frames", 5, "--guidance-scale", 1, "--seed", 1)
    clip = ("generate", "a red circle", *flags, "--vae-decoder", "tiny", "-o", "a.mp4")
    tiny = made(wancli, *clip)
    assert tiny["env"]["vae_decoder"] == "tiny float32"
    again = made(wancli, "repro", "a.mp4", "-o", "b.mp4")
    assert again["request"]["machine"]["vae_decoder"] == "tiny"
    assert (again["hash"], frames(again)) == (tiny["hash"], frames(tiny))


def test_a_rollout_streams_what_its_latents_decode_to_and_resumes_with_another(
    wancli: Wancli, tiny_model: Path, decoder: Path
):
    flags = (*SMALL, "--scheduler", "few-step", "--steps-list", "1000", "--chunk-frames", 1)
    command = ("rollout", "x", "--model", tiny_model, "--force", *flags, "-o", "a.mp4")
    latents = ("--save-latents", "z.safetensors", "--overwrite")
    tiny = made(wancli, *command, "--chunks", 3, "--vae-decoder", decoder, *latents)
    assert tiny["env"]["vae_decoder"] == "tiny float32"
    assert frames(made(wancli, "decode", "z.safetensors", "-o", "b.mp4")) == frames(tiny)
    resume = ("rollout", "--resume", "--force", "-o", "a.mp4")
    exact = made(wancli, *resume, "--vae-decoder", "exact")
    whole = made(wancli, "decode", "z.safetensors", "-o", "c.mp4", "--vae-decoder", "exact")
    assert frames(exact) == frames(whole)
    rerendered = made(wancli, *resume[:1], "--rerender", 2, *resume[2:], "--vae-decoder", decoder)
    assert frames(rerendered) == frames(tiny)


@pytest.mark.parametrize(
    ("flags", "code", "error"),
    [
        (("--vae-decoder", "no.safetensors"), 4, "'no.safetensors' not found"),
        (("--vae-decoder", "A/b:c.pth"), 4, "hint:  wancli model pull A/b:c.pth"),
        (("--vae-decoder", "tiny", "--vae-exact", *RANDOM), 2, "--vae-exact does not work with"),
        (("--vae-decoder", "tiny", "--vae-tiling", *RANDOM), 2, "--vae-tiling does not work"),
        (("--vae-decoder", "tiny", "--model", "hunyuanvideo"), 2, "no tiny decoder for hunyuan"),
        (("--vae-decoder", "{wide}"), 4, "16 latent channels, not 8"),
        (("--vae-decoder", "{cut}"), 4, "cannot read"),
        (("--vae-decoder", ""), 2, "--vae-decoder"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_loads(
    wancli: Wancli, tmp_path: Path, flags: tuple[object, ...], code: int, error: str
):
    shape = TinyDecoderShape(16, widths=(4, 4, 4, 4), blocks=1)
    wide, cut = tmp_path / "wide.safetensors", tmp_path / "cut.safetensors"
    save_file({key: torch.zeros(size) for key, size in shape.parameters.items()}, wide)
    cut.write_bytes(wide.read_bytes()[:-1])
    typed = [str(flag).format(wide=wide, cut=cut) for flag in flags]
    for command in (("generate", "x"), ("plan",)):
        result = wancli(*command, *typed)
        assert result.code == code, result.err
        assert error in result.err


def test_info_says_which_models_a_file_decodes(wancli: Wancli):
    result = wancli("model", "info", DEMO_FOLDER.parent / DEMO_DECODER, "--json")
    about = json.loads(result.out)
    assert (about["part"], about["models"]) == ("vae_decoder", ["demo"])


def test_a_plan_counts_the_tiny_decoder_instead_of_the_exact_one(wancli: Wancli):
    plan = ("plan", "--model", "wan2.1-t2v-1.3b", "--gpu", "h100", "--json")
    exact = json.loads(wancli(*plan).out)["cost"]
    tiny = json.loads(wancli(*plan, "--vae-decoder", "tiny").out)["cost"]
    assert tiny["work"]["decode"]["flops"] < exact["work"]["decode"]["flops"] / 20
    assert tiny["activations"]["decode"] < exact["activations"]["decode"] / 2
    assert tiny["parameters"]["vae"] < exact["parameters"]["vae"]
    assert tiny["work"]["denoise"] == exact["work"]["denoise"]
