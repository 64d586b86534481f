"""`wancli model convert`: what it prints and what it rejects."""

import json
import os
import pickle
from pathlib import Path

import pytest

from tests.cli.test_bad_input import complaint
from tests.conftest import Wancli
from tests.forked import Run
from wancli.catalog.specs import DEMO_FOLDER

CONVERT = ("model", "convert")
WEIGHTS = Path(__file__).parents[1] / "parity" / "weights_original_names.safetensors"


class Code:
    """A pickle that creates a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("it-ran",)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "stated.json"
    path.write_text('{"num_heads": 4}')
    return path


def test_convert_prints_the_folder_and_describes_the_model(wancli: Wancli, config_file: Path):
    result = wancli(*CONVERT, WEIGHTS, "made/out", "--config", config_file)
    assert result.code == 0, result.err
    assert result.out == "made/out\n"
    assert "212,160 parameters, bfloat16: 3 layers, dim 64, 4 heads" in result.err
    assert "--base" in result.err
    assert "--prompt-embeds" in result.err
    assert Path("made/out/transformer/config.json").is_file()


def test_json_output_is_one_object(wancli: Wancli, config_file: Path):
    result = wancli(*CONVERT, WEIGHTS, "out", "--config", config_file, "--json", "-q")
    assert result.err == ""
    summary = json.loads(result.out)
    config = json.loads(Path("out/transformer/config.json").read_text())
    assert {k: v for k, v in config.items() if not k.startswith("_")} == summary.pop("config")
    assert summary == {"path": "out", "parameters": 212160, "dtype": "bfloat16"}


def test_with_a_base_the_model_is_complete(wancli: Wancli, tiny_model: Path, config_file: Path):
    config_file.write_text('{"num_heads": 2}')
    result = wancli(
        *CONVERT, tiny_model / "transformer", "out", "--config", config_file, "--base", tiny_model
    )
    assert result.code == 0, result.err
    assert "--prompt-embeds" not in result.err
    assert Path("out/model_index.json").is_file()


def test_a_base_may_be_named(wancli: Wancli, config_file: Path):
    flags = ("--config", config_file, "--base")
    result = wancli(*CONVERT, DEMO_FOLDER / "transformer", "out", *flags, "demo")
    assert result.code == 0, result.err
    assert (
        Path("out/vae/config.json").read_bytes() == (DEMO_FOLDER / "vae/config.json").read_bytes()
    )
    result = wancli(*CONVERT, DEMO_FOLDER / "transformer", "out", *flags, "demoo")
    assert result.code == 4
    assert "did you mean 'demo'?" in result.err


def test_an_entry_is_converted_with_a_lora(wancli: Wancli, config_file: Path):
    import torch
    from safetensors.torch import load_file, save_file

    tensors, layer = load_file(WEIGHTS), "blocks.0.cross_attn.k"
    averaged = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    torch.save({"generator_ema": averaged, "generator": tensors}, "x.pt")
    save_file(
        {f"{layer}.lora_A.weight": torch.ones(1, 64)}
        | {f"{layer}.lora_B.weight": torch.ones(64, 1)},
        "lora.safetensors",
    )
    flags = ("--config", config_file, "--entry", "generator", "--lora", "lora.safetensors=2")
    result = wancli(*CONVERT, "x.pt", "out", *flags)
    assert result.code == 0, result.err
    weights = load_file("out/transformer/diffusion_pytorch_model.safetensors")
    key, original = weights["blocks.0.attn2.to_k.weight"], tensors[f"{layer}.weight"]
    assert torch.equal(key, (original.double() + 2).bfloat16())


@pytest.mark.parametrize(
    ("flags", "error", "hint"),
    [
        (("--entry", "critic"), "--entry critic", "drop --entry"),
        (("--lora", "no.safetensors"), "no.safetensors", "check the path"),
        (("--lora", WEIGHTS), "LoRA", ""),
    ],
    ids=lambda value: " ".join(map(str, value[:1])) if isinstance(value, tuple) else None,
)
def test_flags_that_the_files_do_not_fit_are_rejected(
    wancli: Wancli, config_file: Path, flags: tuple[object, ...], error: str, hint: str
):
    result = wancli(*CONVERT, WEIGHTS, "out", "--config", config_file, *flags)
    assert result.code == 4
    assert error in complaint(result)[0]
    assert hint in complaint(result)[1]
    assert not Path("out").exists()


def test_an_unknown_number_of_heads_is_asked_for(wancli: Wancli):
    result = wancli(*CONVERT, WEIGHTS, "out")
    assert result.code == 4
    assert complaint(result)[1] == '--config FILE.json with {"num_heads": 4}'
    assert not Path("out").exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_with_code_is_rejected_and_not_run(wancli: Wancli, protocol: int):
    import torch

    torch.save({"generator": {"a": Code()}}, "zip.pt", pickle_protocol=protocol)
    Path("plain.pt").write_bytes(pickle.dumps(Code(), protocol))
    for name in ("zip.pt", "plain.pt"):
        result = wancli(*CONVERT, name, "out")
        assert result.code == 4
        assert name in complaint(result)[0]
        assert not Path("it-ran").exists()
    error = complaint(wancli(*CONVERT, "zip.pt", "out"))[0]
    assert ("posix.mkdir" if protocol == 2 else "without running code") in error


@pytest.mark.parametrize("damage", ["cut", "half", "empty", "garbage"])
@pytest.mark.parametrize("kind", ["x.pt", "x.safetensors"])
def test_a_broken_file_is_named(wancli: Wancli, damage: str, kind: str):
    import torch
    from safetensors.torch import load_file

    if kind == "x.pt":
        torch.save({"generator_ema": load_file(WEIGHTS)}, kind)
    else:
        Path(kind).write_bytes(WEIGHTS.read_bytes())
    whole = Path(kind).read_bytes()
    broken = {"cut": whole[:-70], "half": whole[: len(whole) // 2], "empty": b""}
    Path(kind).write_bytes(broken.get(damage, whole[::-1]))
    result = wancli(*CONVERT, kind, "out")
    assert result.code == 4
    assert kind in complaint(result)[0]
    assert "copy that file again" in complaint(result)[1]
    assert os.listdir() == [kind]  # noqa: PTH208


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ([1, 2], "no state dict"),
        ({}, "no state dict"),
        ({"critic": {"a": 1}, "step": 3}, "holds entries that are not tensors: critic, step"),
    ],
)
def test_a_pickle_without_weights_is_rejected(wancli: Wancli, state: object, error: str):
    import torch

    torch.save(state, "x.pt")
    result = wancli(*CONVERT, "x.pt", "out")
    assert result.code == 4
    assert error in complaint(result)[0]


def test_every_key_that_does_not_match_is_listed(wancli: Wancli, config_file: Path):
    import torch
    from safetensors.torch import load_file

    tensors = load_file(WEIGHTS)
    del tensors["blocks.1.self_attn.q.weight"]
    del tensors["head.modulation"]
    tensors["blocks.0.cross_attn.o.bias"] = torch.zeros(7)
    tensors["blocks.2.ffn.2.bias"] = tensors["blocks.2.ffn.2.bias"].double()
    tensors |= {f"lora.{index}": torch.zeros(1) for index in range(11)}
    torch.save(tensors, "x.pt")
    result = wancli(*CONVERT, "x.pt", "out", "--config", config_file)
    assert result.code == 4
    error = complaint(result)[0]
    assert "missing: blocks.1.attn1.to_q.weight, scale_shift_table;" in error
    assert "unexpected: lora.0, lora.1, lora.10, lora.2" in error
    assert "lora.6 and 3 more;" in error
    assert "of another shape: blocks.0.attn2.to_out.0.bias [7], not [64];" in error
    assert "of another type: blocks.2.ffn.net.2.bias torch.float64" in error
    assert not Path("out").exists()


def test_a_file_without_a_transformer_is_rejected(wancli: Wancli):
    import torch

    torch.save({"encoder.conv1.weight": torch.zeros(3)}, "x.pt")
    result = wancli(*CONVERT, "x.pt", "out")
    assert result.code == 4
    assert "patch_embedding.weight" in complaint(result)[0]


def test_an_existing_folder_is_replaced_only_with_overwrite(wancli: Wancli, config_file: Path):
    Path("out").mkdir()
    result = wancli(*CONVERT, WEIGHTS, "out", "--config", config_file)
    assert result.code == 2
    assert "out exists" in complaint(result)[0]
    assert wancli(*CONVERT, WEIGHTS, "out", "--config", config_file, "--overwrite").code == 0
    Path("out/mine").write_text("mine")
    result = wancli(*CONVERT, WEIGHTS, "out", "--config", config_file, "--overwrite")
    assert result.code == 2
    assert "mine" in complaint(result)[0]
    Path("link").symlink_to("out")
    result = wancli(*CONVERT, WEIGHTS, "link", "--config", config_file, "--overwrite")
    assert (result.code, "link is a symbolic link" in complaint(result)[0]) == (2, True)


def test_a_folder_that_cannot_be_made_is_an_output_error(wancli: Wancli, config_file: Path):
    Path("taken").write_text("a file")
    result = wancli(*CONVERT, WEIGHTS, "taken/out", "--config", config_file)
    assert result.code == 6
    assert "cannot write taken/out" in complaint(result)[0]


@pytest.mark.parametrize("content", [b"[4]", b"{", b"\xff"])
def test_an_invalid_config_file_is_named(wancli: Wancli, config_file: Path, content: bytes):
    config_file.write_bytes(content)
    result = wancli(*CONVERT, WEIGHTS, "out", "--config", config_file)
    assert result.code == 4
    assert "stated.json" in complaint(result)[0]


def test_a_folder_without_shards_is_rejected(wancli: Wancli):
    Path("empty").mkdir()
    result = wancli(*CONVERT, "empty", "out")
    assert result.code == 4
    assert "empty has no *.safetensors" in complaint(result)[0]


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--help"], 0, "--base"),
        (["nosuch.pt", "out"], 4, "'nosuch.pt' not found"),
        (["here", "here"], 2, "here exists"),
    ],
)
def test_help_and_errors_import_nothing_heavy(
    forked: Run, tmp_path: Path, arguments: list[str], code: int, expected: str
):
    (tmp_path / "here").mkdir()
    exit_code, heavy, stdout, stderr = forked(*CONVERT, *arguments, folder=tmp_path)
    assert (exit_code, heavy) == (code, [])
    assert expected in stdout + stderr
