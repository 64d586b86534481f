"""Damaged and malicious files: rejected in two lines before anything loads."""

import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_bad_input import complaint
from tests.conftest import Result, Wancli
from tests.forked import Run
from wancli.catalog.hub_cache import cached_revision
from wancli.catalog.local import find_spec
from wancli.config.resolve import Layer, resolve
from wancli.config.settings import RolloutSettings, Settings
from wancli.errors import InputError, ModelError
from wancli.records.record import ROLLOUT_SCHEMA, Request, RunRecord, parse_record

DEEP = b'{"a":' * 100_000
HUGE = (2**62).to_bytes(8, "little") + b"{}"
PROMPT = ("a red circle",)


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tensors(shapes: dict[str, list[int]], dtype: str = "F32", **metadata: str) -> bytes:
    """A safetensors file of zeros, by shape."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        first, size = end, 4
        for side in shape:
            size *= side
        end = first + size
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * end


def record(command: str = "generate", **more: Any) -> dict[str, Any]:
    kind = RolloutSettings if command == "rollout" else Settings
    resolved = resolve([Layer("flag", {})], kind)
    request = Request("a", 1, resolved.settings, resolved.sources)
    fields = RunRecord("id", "ok", command, "now", request.as_json(), request.hash).as_json()
    fields["request"] |= more.pop("request", {})
    return fields | more


IMAGE = ("rollout", *PROMPT, "--image", "x")
LATENTS = ("rollout", *PROMPT, "--initial-latents", "x")
NOISE = ("rollout", *PROMPT, "--noise-file", "x")
EMBEDS = ("rollout", "--prompt-embeds", "x", "--guidance-scale", "1")
DECODE = ("decode", "x", "-o", "a.mp4")
CONVERT = ("model", "convert", "x.safetensors", "out")
LORA = ("generate", *PROMPT, "--lora", "x.safetensors")
SCRIPT = ("rollout", *PROMPT, "--script", "x.toml")
BENCH = ("bench", "x.toml")
NOT_LATENTS = tensors({"latents": [1, 4, 2, 2]})
CASES: dict[str, tuple[tuple[str, ...], bytes, int, str]] = {
    "a large picture": (IMAGE, png(100_000, 100_000), 4, "pixels"),
    "a larger picture than Pillow likes": (IMAGE, png(10_000, 10_000), 4, "pixels"),
    "a cut picture": (IMAGE, png(96, 96)[:-40], 4, "x"),
    "a picture without rows": (IMAGE, png(96, 96), 4, "x"),
    "not a picture": (IMAGE, b"GIF89a", 4, "not a picture"),
    "a program": (IMAGE, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 4, "not a picture"),
    "latents with a huge header": (LATENTS, HUGE, 4, "safetensors"),
    "latents of whole numbers": (LATENTS, tensors({"latents": [3, 8, 6, 6]}, "I32"), 4, "I32"),
    "latents of another shape": (LATENTS, tensors({"latents": [3, 8, 9, 12]}), 4, "[3, 8, 12, 12]"),
    "no latents": (LATENTS, tensors({"noise": [3, 8, 6, 6]}), 4, "no tensor 'latents'"),
    "noise of another shape": (NOISE, tensors({"noise": [21, 4, 6, 6]}), 4, "[21, 4, 6, 6]"),
    "embeddings of another width": (EMBEDS, tensors({"prompt_embeds": [4, 9]}), 4, "9 wide"),
    "long embeddings": (EMBEDS, tensors({"prompt_embeds": [99, 64]}), 4, "99 tokens"),
    "a row of embeddings": (EMBEDS, tensors({"prompt_embeds": [64]}), 4, "[64]"),
    "latents without a record": (DECODE, NOT_LATENTS, 4, "no wancli record"),
    "latents of another model": (
        DECODE,
        tensors({"latents": [1, 4, 2, 2]}, wancli=json.dumps(record())),
        4,
        "4 channels",
    ),
    "a checkpoint with a deep header": (
        CONVERT, len(DEEP).to_bytes(8, "little") + DEEP, 4, "nested"
    ),
    "a LoRA with a huge header": (LORA, HUGE, 4, "x.safetensors"),
    "a deep script": (SCRIPT, b"at = " + b"[" * 100_000, 4, "nested"),
    "a script of a number": (SCRIPT, b"at = 1", 4, "not a list of tables"),
    "a script of other tables": (SCRIPT, b"[[changes]]\nchunk = 1", 4, "unknown key 'changes'"),
    "a deep bench": (BENCH, b"seeds = " + b"[" * 100_000, 4, "nested"),
    "a bench of numbers": (BENCH, b"prompts = [1]", 4, "is not a bench"),
    "a bench in another encoding": (BENCH, b"prompts = ['\xff']", 4, "UTF-8"),
    "a deep preset": (("preset", "validate", "x.toml"), b"a = " + b"[" * 100_000, 2, "nested"),
    "a preset with a null byte": (
        ("preset", "validate", "x.toml"), b'extends = "\\u0000.toml"', 2, "embedded null"
    ),
    "an empty record": (("show", "x.json"), b"", 4, "no wancli record"),
    "a deep record": (("repro", "x.json"), DEEP, 4, "no wancli record"),
    "a record of bytes": (("show", "x.json"), b"\xff\xfe", 4, "UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda name: name.replace(" ", "-"))
def test_a_hostile_file_is_rejected_before_anything_loads(forked: Run, tmp_path: Path, case: str):
    args, content, code, error = CASES[case]
    for name in ("x", "x.safetensors", "x.toml", "x.json"):
        (tmp_path / name).write_bytes(content)
    exit_code, heavy, out, err = forked(*args, folder=tmp_path)
    assert exit_code == code
    assert error in complaint(Result(exit_code, out, err))[0]
    assert "torch" not in heavy
    assert not (tmp_path / "a.mp4").exists()


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda fields: fields.pop(key)


BROKEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no request": without("request"),
    "no hash": without("hash"),
    "no output": lambda fields: fields.update(output=None),
    "no prompt": lambda fields: fields["request"].pop("prompt"),
    "a seed as text": lambda fields: fields["request"].update(seed="7"),
    "a large seed": lambda fields: fields["request"].update(seed=10**30),
    "a prompt of numbers": lambda fields: fields["request"].update(prompt=[1]),
    "a picture without a name": lambda fields: fields["request"].update(inputs={"image": {}}),
    "no seed of chunk 0": lambda fields: fields["request"].update(inputs={"seeds": [[1, 2]]}),
    "a seed of no chunk": lambda fields: fields["request"].update(inputs={"seeds": [[0]]}),
    "a change of no chunk": lambda fields: fields["request"].update(inputs={"changes": [["a", 1]]}),
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda name: name.replace(" ", "-"))
def test_a_broken_record_is_rejected_with_the_reason(damage: str):
    for command in ("generate", "rollout"):
        fields = record(command)
        assert parse_record(json.dumps(fields), origin="x.json") == fields
        BROKEN[damage](fields)
        with pytest.raises(InputError, match=r"^x.json is a broken record: \w[\w.]*: [^\n]*\.$"):
            parse_record(json.dumps(fields), origin="x.json")


@pytest.mark.parametrize("command", ["show", "repro"])
def test_a_broken_record_is_rejected_before_anything_loads(
    forked: Run, tmp_path: Path, command: str
):
    (tmp_path / "x.json").write_text(json.dumps(record(request={"seed": None})))
    code, heavy, out, err = forked(command, "x.json", folder=tmp_path)
    assert (code, heavy) == (4, [])
    assert "broken record: request.seed" in complaint(Result(code, out, err))[0]


@pytest.mark.parametrize(
    ("table", "value"),
    [("video", None), ("video", {}), ("rollout", []), ("rollout", {"chunks": "2"})],
)
def test_a_rollout_record_with_wrong_types_is_not_resumed(
    wancli: Wancli, table: str, value: object
):
    fields = {"schema": ROLLOUT_SCHEMA, **record("rollout")["request"], table: value}
    Path("a.rollout").mkdir()
    Path("a.rollout/rollout.json").write_text(json.dumps(fields))
    result = wancli("rollout", "--resume", "-o", "a.mp4")
    assert result.code == 4
    assert f"broken record: {table}" in complaint(result)[0]


CONFIGS: dict[str, dict[str, tuple[Any, ...]]] = {
    "transformer/config.json": {
        "num_layers": (0, "2", None, [], 10**9), "patch_size": (2, [1, 2], [1, 0, 2], None),
        "eps": ("x", 0, None), "image_dim": (0, "x"), "_class_name": (1, None), "text_dim": (32,),
    },
    "vae/config.json": {
        "scale_factor_temporal": (0, "4", None, 8), "scale_factor_spatial": (7,),
        "dim_mult": (2, [0], [1, 1]), "z_dim": (8,),
        "latents_mean": (None, ["x"], [], [1e400] * 4, [10**400] * 4),
        "temperal_downsample": ([0],), "in_channels": (12,),
        "out_channels": (None, 12), "patch_size": ([1, 2, 2], 7),
    },
    "text_encoder/config.json": {
        "d_model": (-1, 2.5, {}, 8), "num_layers": (True,),
        "relative_attention_max_distance": (7,),
    },
    "tokenizer/tokenizer_config.json": {"model_max_length": ("x", 0, None)},
    "model_index.json": {
        "vae": (1, "x", [None]), "transformer_2": ({}, 0), "boundary_ratio": (0, 2, "x"),
        "expand_timesteps": (1,), "_class_name": (["WanPipeline"],),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_config_with_impossible_values_is_rejected(
    tiny_model: Path, tmp_path: Path, name: str
):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    sound = json.loads((model / name).read_text())
    for key, values in CONFIGS[name].items():
        for value in values:
            (model / name).write_text(json.dumps({**sound, key: value}))
            with pytest.raises(ModelError) as refused:
                find_spec(str(model))
            assert key in str(refused.value)
            assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"[]", DEEP, b"\xff", b'{"a": 1' + b"0" * 5000 + b"}"])
def test_a_model_with_unreadable_configs_is_rejected(
    tiny_model: Path, tmp_path: Path, content: bytes
):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "vae/config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"vae/config\.json"):
        find_spec(str(model))


def test_a_model_that_diffusers_cannot_load_is_one_error(
    wancli: Wancli, tiny_model: Path, tmp_path: Path
):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "scheduler/scheduler_config.json").write_text('{"_class_name": {"a": []}}')
    result = wancli("generate", *PROMPT, "--model", model, "--size", "32x32", "--frames", 5, "-q")
    assert result.code == 4
    assert "cannot load model" in complaint(result)[0]


@pytest.mark.parametrize("content", [b"\xff", b"x" * 300, b"..", b"a/b", b"a\0b", b""])
def test_a_broken_ref_in_the_hub_cache_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--a--b/refs").mkdir(parents=True)
    (tmp_path / "models--a--b/refs/main").write_bytes(content)
    assert cached_revision("a/b") == ""


SCHEDULER = "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        (SCHEDULER, {"predict_x0": 0}, "gives no working scheduler"),
        (SCHEDULER, {"disable_corrector": "x"}, "gives no working scheduler"),
        (SCHEDULER, {"lower_order_final": None}, "not finite"),
        (SCHEDULER, {"final_sigmas_type": []}, "gives no working scheduler"),
        ("tokenizer/tokenizer_config.json", {"pad_token": None}, "padding token"),
        ("vae/config.json", {"latents_mean": ...}, "latents_mean of 16"),
    ],
)
def test_configs_that_would_fail_in_use_are_rejected_on_loading(
    wancli: Wancli, tiny_model: Path, tmp_path: Path, name: str, change: Any, error: str
):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / name).read_text()) | change
    config = {key: value for key, value in config.items() if value is not ...}
    (model / name).write_text(json.dumps(config))
    result = wancli("generate", *PROMPT, "--model", model, "--size", "32x32", "--frames", 5, "-q")
    assert result.code == 4
    assert error in complaint(result)[0]


@pytest.mark.parametrize("name", ["noise", "prompt_embeds", "latents"])
def test_non_finite_tensors_are_rejected(tmp_path: Path, name: str):
    import torch
    from safetensors.torch import save_file

    from wancli.rollouts.context import read_tensors

    save_file({name: torch.tensor([1.0, torch.inf])}, tmp_path / "x")
    with pytest.raises(InputError, match=f"{name} is not finite"):
        read_tensors(tmp_path / "x", name)


def test_files_with_malformed_chunk_names_are_ignored(tmp_path: Path):
    from wancli.rollouts.store import RolloutStore

    for name in ("chunk-abc", "chunk-", "chunk--00001", "chunk-1", "chunk-000007"):
        (tmp_path / f"{name}.safetensors").touch()
    assert RolloutStore(tmp_path).chunks() == [7]


def test_broken_presets_are_listed_as_broken(wancli: Wancli):
    broken = {
        "key": "steps = 3", "model": "model = [1]", "loop": 'extends = "loop2"',
        "loop2": 'extends = "loop"', "nowhere": 'model = "none/such/model"',
        "tuned": "[tuned_for]\nmodel = [1]", "value": '[sampling]\nsteps = "x"',
    }  # fmt: skip
    Path("presets").mkdir()
    for name, content in broken.items():
        Path(f"presets/{name}.toml").write_text(content)
    result = wancli("preset", "list", "--json")
    assert (result.code, result.err) == (0, "")
    rows = {row["name"]: row for row in map(json.loads, result.out.splitlines())}
    for name in ("key", "model", "tuned"):
        assert rows[name]["description"].startswith("broken: ")
    assert {rows[name]["task"] for name in broken if name not in ("key", "model", "tuned")} == {""}
    for name in ("model", "tuned"):
        assert wancli("generate", *PROMPT, "--preset", name).code == 2


READERS = [
    ("preset", "validate", "x"), ("show", "x"), ("show", "x.json"), ("repro", "x"),
    ("compare", "x", "x"), ("preview", "x"), IMAGE, LATENTS, NOISE, EMBEDS, DECODE,
    ("rollout", *PROMPT, "--extend", "x"), SCRIPT, BENCH, ("bench", "x.txt"), LORA,
    ("model", "convert", "x.safetensors", "out"), ("generate", *PROMPT, "--preset", "x.toml"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "args"),
    [*(("pipe", args) for args in READERS), *(("folder", args) for args in READERS[::3])],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_folders_and_pipes_are_rejected_without_waiting(
    forked: Run, tmp_path: Path, args: tuple[str, ...], kind: str
):
    for name in ("x", "x.json", "x.toml", "x.txt", "x.safetensors"):
        (tmp_path / name).mkdir() if kind == "folder" else os.mkfifo(tmp_path / name)
    code, _, out, err = forked(*args, folder=tmp_path)
    complaint(Result(code, out, err))
    assert code in (2, 4)
