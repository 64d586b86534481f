"""The original's numbers by the command line alone: `model convert`, then `rollout` of tensors."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import Wancli

PARITY = Path(__file__).parents[1] / "parity"


@pytest.mark.parametrize("name", ["t2v_full", "t2v_win6", "init_full", "init_win6"])
def test_a_converted_checkpoint_rolls_out_as_the_original_did(wancli: Wancli, name: str):
    case = json.loads((PARITY / f"case_{name}.json").read_text())
    Path("heads.json").write_text('{"num_heads": 4}')
    said = wancli(
        "model", "convert", PARITY / "weights_original_names.safetensors", "model",
        "--config", "heads.json",
    )  # fmt: skip
    assert said.code == 0, said.err
    window, given = max(0, case["local_attn_size_frames"]), case["initial_latent_frames"]
    start: tuple[object, ...] = ()
    if given:
        inputs = load_file(PARITY / "inputs.safetensors")
        save_file({"latents": inputs["initial_latent"][:given].contiguous()}, "start.safetensors")
        start = ("--initial-latents", "start.safetensors")
    said = wancli(
        "rollout", "--model", "model", "--chunks", case["noise_frames"] // 3, "--size", "64x64",
        "--rolling-window", window, "--dtype", "float32", "--text-length", 16, "--no-video",
        "--noise-file", PARITY / "inputs.safetensors", *start,
        "--prompt-embeds", PARITY / "inputs.safetensors", "--save-latents", "z.safetensors", "-q",
    )  # fmt: skip
    assert said.code == 0, said.err
    expected = load_file(PARITY / f"case_{name}.safetensors")["latents"]
    error = (load_file("z.safetensors")["latents"] - expected).abs().max().item()
    assert error < 5e-6, f"{error:.1e} off"
