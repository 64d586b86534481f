"""Parity with Self-Forcing through the command line: `model convert`, then `rollout` of tensors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Wancli

PARITY = Path(__file__).parents[1] / "parity"


def convert(wancli: Wancli) -> None:
    """Convert the original's tiny weights to the folder ./model."""
    Path("heads.json").write_text('{"num_heads": 4}')
    result = wancli(
        "model", "convert", PARITY / "weights_original_names.safetensors", "model",
        "--config", "heads.json",
    )  # fmt: skip
    assert result.code == 0, result.err


@pytest.mark.parametrize("name", ["t2v_win6", "init_full"])
def test_a_converted_checkpoint_reproduces_the_original_rollout(wancli: Wancli, name: str):
    case = json.loads((PARITY / f"case_{name}.json").read_text())
    convert(wancli)
    window, initial_frames = max(0, case["local_attn_size_frames"]), case["initial_latent_frames"]
    start: tuple[object, ...] = ()
    if initial_frames:
        inputs = load_file(PARITY / "inputs.safetensors")
        save_file(
            {"latents": inputs["initial_latent"][:initial_frames].contiguous()}, "start.safetensors"
        )
        start = ("--initial-latents", "start.safetensors")
    result = wancli(
        "rollout", "--model", "model", "--chunks", case["noise_frames"] // 3, "--size", "64x64",
        "--rolling-window", window, "--dtype", "float32", "--text-length", 16, "--no-video",
        "--noise-file", PARITY / "inputs.safetensors", *start,
        "--prompt-embeds", PARITY / "inputs.safetensors", "--save-latents", "z.safetensors", "-q",
    )  # fmt: skip
    assert result.code == 0, result.err
    expected = load_file(PARITY / f"case_{name}.safetensors")["latents"]
    error = (load_file("z.safetensors")["latents"] - expected).abs().max().item()
    assert error < 5e-6, f"{error:.1e} off"


def test_a_guided_rollout_reproduces_the_original_and_needs_no_unused_noise(wancli: Wancli):
    """Renoising eight steps a chunk would take 84 frames of noise; the file holds 72."""
    case = json.loads((PARITY / "case_cfg_win6.json").read_text())
    convert(wancli)
    result = wancli(
        "rollout", "--model", "model", "--chunks", case["noise_frames"] // 3, "--size", "64x64",
        "--rolling-window", case["local_attn_size_frames"], "--dtype", "float32",
        "--sampler", "unipc", "--steps", case["sampling_steps"],
        "--flow-shift", case["timestep_shift"], "--guidance-scale", case["guidance_scale"],
        "--text-length", 16, "--noise-file", PARITY / "inputs.safetensors",
        "--prompt-embeds", PARITY / "inputs.safetensors",
        "--no-video", "--save-latents", "z.safetensors", "-q", "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    latents = load_file("z.safetensors")["latents"]
    golden = load_file(PARITY / "case_cfg_win6.safetensors")
    assert (latents[-3:] - golden["last_chunk"]).abs().max() < 2e-5
    sigmas = [row["sigmas"] for row in json.loads(result.out)["timings"]["chunks"]]
    assert sigmas == [pytest.approx(golden["scheduler_sigmas"][:-1].tolist(), abs=1e-4)] * 4


def test_longlive_2s_checkpoint_and_preset_reproduce_its_rollout_from_a_picture(wancli: Wancli):
    """Saved as its merge_lora_generator.py does; window and sink are as many chunks as there."""
    weights = load_file(PARITY / "weights_original_names.safetensors")
    state = {f"model.{name}": tensor for name, tensor in weights.items()}
    torch.save({"generator": state, "merged_lora": True, "dtype": "bfloat16"}, "model_bf16.pt")
    Path("heads.json").write_text('{"num_heads": 4}')
    wancli("model", "convert", "model_bf16.pt", "model", "--config", "heads.json")
    picture = load_file(PARITY / "inputs.safetensors")["initial_latent"][:1].contiguous()
    save_file({"latents": picture}, "picture.safetensors")
    result = wancli(
        "rollout", "--model", "model", "--preset", "longlive2", "--size", "64x64",
        "--dtype", "float32", "--text-length", 16, "--chunks", 7, "--chunk-frames", 3,
        "--rolling-window", 12, "--sink-frames", 3, "--initial-latents", "picture.safetensors",
        "--noise-file", PARITY / "inputs.safetensors",
        "--prompt-embeds", PARITY / "inputs.safetensors",
        "--no-video", "--save-latents", "z.safetensors", "-q",
    )  # fmt: skip
    assert result.code == 0, result.err
    latents = load_file("z.safetensors")["latents"]
    expected = load_file(PARITY / "authors_longlive2.safetensors")["longlive2_from_image"]
    assert len(latents) == 21
    assert (latents[-3:] - expected).abs().max() < 5e-6
