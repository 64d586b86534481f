"""`wancli model convert`: what it prints, and what it refuses."""

import json
import os
import pickle
from pathlib import Path

import pytest

from tests.cli.test_bad_input import complaint
from tests.conftest import Wancli
from tests.forked import Run

CONVERT = ("model", "convert")
WEIGHTS = Path(__file__).parents[1] / "parity" / "weights_original_names.safetensors"


class Code:
    """A pickle that makes a folder when it is loaded as pickles are."""

    def __reduce__(self):
        return os.mkdir, ("it-ran",)


@pytest.fixture
def stated(tmp_path: Path) -> Path:
    path = tmp_path / "stated.json"
    path.write_text('{"num_heads": 4}')
    return path


def test_the_result_is_the_folder_and_the_talk_says_what_it_is(wancli: Wancli, stated: Path):
    said = wancli(*CONVERT, WEIGHTS, "made/out", "--config", stated)
    assert said.code == 0, said.err
    assert said.out == "made/out\n"
    assert "212,160 parameters, bfloat16: 3 layers, dim 64, 4 heads" in said.err
    assert "--base" in said.err
    assert "--prompt-embeds" in said.err
    assert Path("made/out/transformer/config.json").is_file()


def test_json_is_one_object(wancli: Wancli, stated: Path):
    said = wancli(*CONVERT, WEIGHTS, "out", "--config", stated, "--json", "-q")
    assert said.err == ""
    told = json.loads(said.out)
    config = json.loads(Path("out/transformer/config.json").read_text())
    assert {k: v for k, v in config.items() if not k.startswith("_")} == told.pop("config")
    assert told == {"path": "out", "parameters": 212160, "dtype": "bfloat16"}


def test_with_a_base_nobody_says_that_anything_is_lacking(
    wancli: Wancli, tiny_model: Path, stated: Path
):
    stated.write_text('{"num_heads": 2}')
    said = wancli(
        *CONVERT, tiny_model / "transformer", "out", "--config", stated, "--base", tiny_model
    )
    assert said.code == 0, said.err
    assert "--prompt-embeds" not in said.err
    assert Path("out/model_index.json").is_file()


def test_heads_that_nobody_told_are_asked_for(wancli: Wancli):
    said = wancli(*CONVERT, WEIGHTS, "out")
    assert said.code == 4
    assert complaint(said)[1] == '--config FILE.json with {"num_heads": 4}'
    assert not Path("out").exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(wancli: Wancli, protocol: int):
    import torch

    torch.save({"generator": {"a": Code()}}, "zip.pt", pickle_protocol=protocol)
    Path("plain.pt").write_bytes(pickle.dumps(Code(), protocol))
    for name in ("zip.pt", "plain.pt"):
        said = wancli(*CONVERT, name, "out")
        assert said.code == 4
        assert name in complaint(said)[0]
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
    said = wancli(*CONVERT, kind, "out")
    assert said.code == 4
    assert kind in complaint(said)[0]
    assert "copy that file again" in complaint(said)[1]
    assert os.listdir() == [kind]  # noqa: PTH208


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ([1, 2], "no state dict"),
        ({}, "no state dict"),
        ({"critic": {"a": 1}, "step": 3}, "holds entries that are not tensors: critic, step"),
    ],
)
def test_a_pickle_without_weights_is_refused(wancli: Wancli, state: object, error: str):
    import torch

    torch.save(state, "x.pt")
    said = wancli(*CONVERT, "x.pt", "out")
    assert said.code == 4
    assert error in complaint(said)[0]


def test_every_key_that_does_not_fit_is_listed(wancli: Wancli, stated: Path):
    import torch
    from safetensors.torch import load_file

    tensors = load_file(WEIGHTS)
    del tensors["blocks.1.self_attn.q.weight"]
    del tensors["head.modulation"]
    tensors["blocks.0.cross_attn.o.bias"] = torch.zeros(7)
    tensors["blocks.2.ffn.2.bias"] = tensors["blocks.2.ffn.2.bias"].double()
    tensors |= {f"lora.{index}": torch.zeros(1) for index in range(11)}
    torch.save(tensors, "x.pt")
    said = wancli(*CONVERT, "x.pt", "out", "--config", stated)
    assert said.code == 4
    error = complaint(said)[0]
    assert "missing: blocks.1.attn1.to_q.weight, scale_shift_table;" in error
    assert "unexpected: lora.0, lora.1, lora.10, lora.2" in error
    assert "lora.6 and 3 more;" in error
    assert "of another shape: blocks.0.attn2.to_out.0.bias [7], not [64];" in error
    assert "of another type: blocks.2.ffn.net.2.bias torch.float64" in error
    assert not Path("out").exists()


def test_what_is_no_transformer_is_refused(wancli: Wancli):
    import torch

    torch.save({"encoder.conv1.weight": torch.zeros(3)}, "x.pt")
    said = wancli(*CONVERT, "x.pt", "out")
    assert said.code == 4
    assert "patch_embedding.weight" in complaint(said)[0]


def test_a_folder_that_exists_is_never_replaced_unasked(wancli: Wancli, stated: Path):
    Path("out").mkdir()
    said = wancli(*CONVERT, WEIGHTS, "out", "--config", stated)
    assert said.code == 2
    assert "out exists" in complaint(said)[0]
    assert wancli(*CONVERT, WEIGHTS, "out", "--config", stated, "--overwrite").code == 0
    Path("out/mine").write_text("mine")
    said = wancli(*CONVERT, WEIGHTS, "out", "--config", stated, "--overwrite")
    assert said.code == 2
    assert "mine" in complaint(said)[0]
    Path("link").symlink_to("out")
    said = wancli(*CONVERT, WEIGHTS, "link", "--config", stated, "--overwrite")
    assert (said.code, "link is a symbolic link" in complaint(said)[0]) == (2, True)


def test_a_folder_that_cannot_be_made_is_an_output_error(wancli: Wancli, stated: Path):
    Path("taken").write_text("a file")
    said = wancli(*CONVERT, WEIGHTS, "taken/out", "--config", stated)
    assert said.code == 6
    assert "cannot write taken/out" in complaint(said)[0]


@pytest.mark.parametrize("content", [b"[4]", b"{", b"\xff"])
def test_a_config_that_is_none_is_named(wancli: Wancli, stated: Path, content: bytes):
    stated.write_bytes(content)
    said = wancli(*CONVERT, WEIGHTS, "out", "--config", stated)
    assert said.code == 4
    assert "stated.json" in complaint(said)[0]


def test_a_folder_without_shards_is_refused(wancli: Wancli):
    Path("empty").mkdir()
    said = wancli(*CONVERT, "empty", "out")
    assert said.code == 4
    assert "empty has no *.safetensors" in complaint(said)[0]


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--help"], 0, "--base"),
        (["nosuch.pt", "out"], 4, "nosuch.pt not found"),
        (["here", "here"], 2, "here exists"),
    ],
)
def test_what_needs_no_weights_is_instant(
    forked: Run, tmp_path: Path, arguments: list[str], code: int, told: str
):
    (tmp_path / "here").mkdir()
    found, heavy, stdout, stderr = forked(*CONVERT, *arguments, folder=tmp_path)
    assert (found, heavy) == (code, [])
    assert told in stdout + stderr
