"""Invalid input: one `error:` line, one `hint:` line, the right exit code, and no file lost."""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import Result, Wancli

GENERATE = ("generate", "a red circle")
LISTED = (*GENERATE, "--sampler", "few-step", "--steps-list", "1000,500")
CACHED = (*GENERATE, "--use-cachedit", "--cachedit-fn", 1)


def complaint(result: Result) -> tuple[str, str]:
    """The error and the hint, which must be the only output."""
    lines = result.err.strip().splitlines()
    assert result.out == ""
    assert len(lines) == 2, result.err
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint:  ")
    return lines[0][7:], lines[1][7:]


@pytest.mark.parametrize(
    ("args", "error", "hint"),
    [
        (("generate", "  \n"), "the prompt is empty", "in quotes"),
        (("generate",), "the prompt is empty", "in quotes"),
        (("generate", "a", "-p", "b"), "set twice", "drop --prompt"),
        ((*GENERATE, "--num-frames", 80), "--num-frames 80 is not 4k+1.", "use 77 or 81"),
        ((*GENERATE, "--num_frames", 80), "--num-frames 80 is not 4k+1.", "use 77 or 81"),
        (
            (*GENERATE, "--size", "960x540"),
            "--size 960x540: height must be a multiple of 16.",
            "--size 960x544",
        ),
        ((*GENERATE, "--size", "big"), "--size 'big' is not a size", "832x480"),
        ((*GENERATE, "--steps", 0), "--steps 0", "1 to 1000"),
        ((*GENERATE, "--encoder", "nvenc", "--lossless"), "does not encode RGB", "--encoder x264"),
        ((*GENERATE, "--encoder", "nvenc", "--encoder-preset", "fast"), "is one of x264", "drop"),
        ((*GENERATE, "--guidance-scale", "nan"), "--guidance-scale nan", "Guidance scale"),
        ((*GENERATE, "--use-cachedit", "--cachedit-fn", 8), "leave none of 8 blocks", "--cachedit"),
        ((*GENERATE, "--cachedit-residual-threshold", 0), "threshold 0", "above 0"),
        ((*GENERATE, "--taylorseer"), "--taylorseer does nothing without", "--use-cachedit"),
        ((*GENERATE, "--step-cache-threshold", 1), "does nothing without", "first-block"),
        ((*GENERATE, "--step-cache", "magic"), "--step-cache 'magic'", "cachedit"),
        ((*GENERATE, "--use-cachedit", "--step-cache", "seacache"), "set twice", "once"),
        ((*GENERATE, "--size", "96x96", "--width", 80), "--width is set twice", "once"),
        ((*CACHED, "--steps", 8), "in 8 steps", "--steps 20"),
        ((*CACHED, "--cachedit-max-warmup-steps", 20), "leaves none of 20", "--cachedit-max"),
        ((*GENERATE, "--step-cache", "magcache"), "ratios; demo has none", "--use-cachedit"),
        ((*GENERATE, "--cachedit-preset", "demo2"), "preset 'demo2' not found", "demo"),
        ((*GENERATE, "--cachedit-preset", "wan2.1-t2v-14b"), "turn on a step cache", "list"),
        ((*GENERATE, "--cachedit-preset", "demo"), "does not turn on a step cache", "preset list"),
        ((*GENERATE, "--no-prompt-kv", "--free-kv-weights"), "--free-kv-weights needs", "drop"),
        ((*GENERATE, "--cfg-gate", 1), "--cfg-gate 1 is neither", "0.6"),
        ((*GENERATE, "--preset", "demo-cached", "--steps", 10), "tuned for sampling", "--tune"),
        ((*GENERATE, "--cachedit-preset", "wan2.1-t2v-1.3b-cached"), "tuned for model", "--tune"),
        ((*GENERATE, "--cfg-gate", 20), "never reached in 20 steps", "--cfg-gate 0.5"),
        ((*GENERATE, "--cfg-gate", 0.5, "--guidance-scale", 1), "needs guidance", "drop"),
        ((*GENERATE, "--kv-align", "wide"), "--kv-align 'wide'", "auto"),
        ((*LISTED, "--use-cachedit"), "2 listed steps", "--step-cache none"),
        ((*LISTED, "--sampler", "euler", "--use-cachedit"), "2 listed steps", "--step-cache none"),
        ((*LISTED, "--guidance-scale", 3), "distilled", "--guidance-scale 1"),
        ((*LISTED, "--cfg-gate", 2), "runs without", "drop --cfg-gate"),
        ((*LISTED, "--steps", 4), "--steps does nothing with --steps-list", "drop --steps"),
        ((*LISTED, "--steps-list", "250,500"), "must decrease", "--steps-list 1000,"),
        ((*LISTED, "--steps-list", "1000;500"), "'1000;500'", "separated by commas"),
        ((*LISTED, "--steps-list", "1001"), "at most 1000", "--steps-list 1000,"),
        ((*LISTED, "--sampler", "unipc"), "--scheduler unipc.", "or --scheduler euler"),
        ((*GENERATE, "--steps-list", "9,8"), "unipc, the model default.", "--scheduler few-step"),
        ((*GENERATE, "--no-warp-steps"), "does nothing without --steps-list", "drop --warp"),
        (("rollout", "a", "--step-cache", "seacache"), "diffusers' own loop", "--use-cachedit"),
        (("rollout", "a", "--cfg-gate", 0.5), "does not work with rollouts", "drop --cfg-gate"),
        ((*GENERATE, "--device", "tpu"), "--device 'tpu': not of this form.", "cuda:N or mps"),
        ((*GENERATE, "--guidance-scale-2", 3), "two experts", "drop --guidance-scale-2"),
        ((*GENERATE, "--seed", -1), "--seed '-1'", "random"),
        ((*GENERATE, "--seed", 2**53 + 1), "over 2^53", "at most"),
        ((*GENERATE, "--seed", "9-0"), "not a range", "0-9"),
        ((*GENERATE, "--seed", "1,1"), "twice", "once"),
        ((*GENERATE, "--seed", "1,2", "-N", 2), "needs a single seed", "--num-videos"),
        ((*GENERATE, "--preset", "wan2.2-ti2v"), "preset 'wan2.2-ti2v' not", "wan2.2-ti2v-5b"),
        (("rollout", "x", "-o", "."), "'.' is not a file name", "x.mp4"),
        (("rollout", "--resume", "-o", "/"), "'/' is not a file name", "x.mp4"),
        ((*GENERATE, "-o", "new/"), "'new/' is not a file name", "new/x.mp4"),
        ((*GENERATE, "-o", "/tmp"), "does not end in .mp4", "/tmp/out.mp4"),
        ((*GENERATE, "-o", "a.avi"), "does not end in .mp4", "a.mp4"),
        ((*GENERATE, "-o", "x" * 252 + ".mp4"), "256 bytes", "shorter"),
        ((*GENERATE, "-o", "{promt}.mp4"), "unknown field '{promt}'", "{prompt}"),
        ((*GENERATE, "--dtype", "float16", "--device", "cpu"), "float16", "bfloat16"),
        # Typer's own errors
        ((*GENERATE, "--step", 3), "No such option: --step", "--steps"),
        (("rollout", "a", "--num-frames", 81), "No such option: --num-frames", "--chunks N"),
        (("batch", "a.jsonl", "--steps", 4), "No such option: --steps", '{"defaults": {"steps": '),
        (("generate", "a", "--chunks", 3), "No such option: --chunks", "a rollout has --chunks N"),
        ((*GENERATE, "--steps", "abc"), "'--steps'", "wancli generate --help"),
        ((*GENERATE, "--steps"), "requires an argument", "wancli generate --help"),
        (("generate", "red", "circle"), "unexpected argument 'circle'", "generate 'red circle'"),
        (("rollout", "a", "--", "--at", 3, "b"), "unexpected argument '--at'", "quote the prompt"),
        (("compare", "a", "b", "c"), "unexpected argument 'c'", "wancli compare --help"),
        (("genrate",), "No such command 'genrate'", "'generate'"),
        (("batch", "statu", "x"), "No such command 'statu'", "'status'"),
        (("show",), "Missing argument", "wancli show --help"),
    ],
)  # fmt: skip
def test_an_invalid_request_is_rejected_before_anything_loads(
    wancli: Wancli, args: tuple[object, ...], error: str, hint: str
):
    result = wancli(*args)
    message, advice = complaint(result)
    assert result.code == 2
    assert error in message
    assert hint in advice


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("--step", "--steps"),
        ("--stpes", "--steps"),
        ("--cfg", "--crf, --cfg-gate"),
        ("--cachedit", "--cachedit-fn, --cachedit-bn, --use-cachedit"),
    ],
)
def test_an_unknown_flag_suggests_the_closest_first_and_only_those_as_close(
    wancli: Wancli, typed: str, hint: str
):
    assert complaint(wancli(*GENERATE, typed, 3))[1] == hint


def test_an_unexpected_error_is_printed_in_one_line(
    wancli: Wancli, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("wancli.generation.batch.make_plan", broken)
    result = wancli(*GENERATE)
    assert result.code == 1
    assert "ZeroDivisionError" in complaint(result)[0]
    monkeypatch.setenv("WANCLI_DEBUG", "1")
    with pytest.raises(Exception, match="by zero"):
        wancli(*GENERATE)


def test_an_unknown_model_suggests_a_similar_one(wancli: Wancli):
    result = wancli(*GENERATE, "--model", "wan2.1-t2v-13b")
    assert result.code == 4
    assert "did you mean 'wan2.1-t2v-1" in complaint(result)[1]


@pytest.mark.parametrize("command", ["generate", "rollout", "plan"])
def test_an_invalid_environment_variable_is_named(
    wancli: Wancli, monkeypatch: pytest.MonkeyPatch, command: str
):
    monkeypatch.setenv("WANCLI_MODEL", "nope")
    result = wancli(command, "x")
    assert result.code == 4
    assert complaint(result)[0] == "WANCLI_MODEL: model 'nope' not found."
    monkeypatch.setenv("WANCLI_PRESET", "nothing")
    result = wancli(command, "x")
    assert result.code == 2
    assert complaint(result)[0] == "WANCLI_PRESET: preset 'nothing' not found."


@pytest.mark.parametrize(
    ("files", "error"),
    [
        ({}, "model_index.json"),
        ({"model_index.json": '{"_class_name": "FluxPipeline"}'}, "FluxPipeline"),
    ],
    ids=["no model", "another model"],
)
def test_a_folder_without_a_supported_model_is_rejected(
    wancli: Wancli, tmp_path: Path, files: dict[str, str], error: str
):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    result = wancli(*GENERATE, "--model", tmp_path)
    assert result.code == 4
    assert error in complaint(result)[0]


@pytest.mark.parametrize(
    ("part", "damage"),
    [
        ("transformer", "missing"), ("transformer", "cut"), ("transformer", "empty"),
        ("transformer", "garbage"), ("vae", "cut"), ("text_encoder", "missing"),
        ("vae", "pointer"), ("transformer", "shard"),
    ],
)  # fmt: skip
def test_broken_weights_are_named(
    wancli: Wancli, tiny_model: Path, tmp_path: Path, part: str, damage: str
):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (weights,) = (model / part).glob("*.safetensors")
    whole = weights.read_bytes()
    if damage == "missing":
        weights.unlink()
    elif damage == "shard":
        named = {"a.weight": "first.safetensors", "b.weight": "second.safetensors"}
        index = weights.with_name(f"{weights.name}.index.json")
        weights.rename(weights.with_name("first.safetensors"))
        index.write_text(json.dumps({"weight_map": named}))
    else:
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
        contents = {"cut": whole[:-7], "empty": b"", "garbage": whole[::-1], "pointer": pointer}
        weights.write_bytes(contents[damage])
    result = wancli(*GENERATE, "--model", model, "--size", "32x32", "--frames", 5)
    assert result.code == 4
    error, hint = complaint(result)[:2]
    assert part in error
    if damage == "shard":
        assert "second.safetensors" in error
    if damage == "pointer":
        assert "git lfs pull" in hint


def test_a_missing_key_is_an_error_not_a_random_weight(
    wancli: Wancli, tiny_model: Path, tmp_path: Path
):
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(tiny_model, tmp_path / "model")
    (weights,) = (model / "transformer").glob("*.safetensors")
    tensors = load_file(weights)
    del tensors["proj_out.weight"]
    save_file(tensors, weights)
    result = wancli(*GENERATE, "--model", model, "--size", "32x32", "--frames", 5, "-q")
    assert result.code == 4
    assert "proj_out.weight" in complaint(result)[0]


def test_a_missing_device_is_named(wancli: Wancli, tiny_model: Path):
    result = wancli(
        *GENERATE,
        "--model",
        tiny_model,
        "--device",
        "cuda:7",
        "--size",
        "32x32",
        "--frames",
        5,
        "-q",
    )
    assert result.code == 4
    assert "--device cuda:7" in complaint(result)[0]


def test_an_existing_file_is_not_replaced_without_overwrite(wancli: Wancli):
    Path("a.mp4").write_text("mine")
    result = wancli(*GENERATE, "-o", "a.mp4")
    assert result.code == 2
    assert "exists" in complaint(result)[0]
    assert Path("a.mp4").read_text() == "mine"


def test_a_json_file_that_is_not_a_record_is_never_replaced(wancli: Wancli):
    Path("a.json").write_text('{"mine": 1}')
    result = wancli(*GENERATE, "-o", "a.mp4", "--overwrite")
    assert result.code == 2
    assert json.loads(Path("a.json").read_text()) == {"mine": 1}


def test_a_folder_that_cannot_be_made_is_an_output_error(wancli: Wancli):
    Path("taken").write_text("a file")
    result = wancli(*GENERATE, "-o", "taken/a.mp4")
    assert result.code == 6
    assert "cannot write taken/a.mp4" in complaint(result)[0]


@pytest.mark.parametrize(
    ("content", "error", "hint"),
    [
        (b'[sampling]\nstep = 3\n', "[sampling] unknown key 'step'.", "'steps'"),
        (b'[smapling]\nsteps = 3\n', "unknown key 'smapling'", "'sampling'"),
        (b'steps = 3\n', "unknown key 'steps'", "[sampling]"),
        (b'sampling = 3\n', "is a table", "[sampling]"),
        (b'[sampling\n', "x.toml", "toml"),
        (b'# \xff\xfe\n', "not UTF-8", "UTF-8"),
        (b'extends = "x"\n', "extends itself", "extends"),
        (b'extends = "dmeo"\n', "preset 'dmeo' not found", "'demo'"),
        (b'extends = 3\n', "'extends' must be text", 'extends = "..."'),
        (b'[sampling]\nsteps = "many"\n', "sampling.steps 'many'", "--steps"),
        (b'[sampling]\nsteps = -2\n', "sampling.steps -2", "1 to 1000"),
    ],
)  # fmt: skip
def test_a_broken_preset_is_rejected_by_file_and_key(
    wancli: Wancli, content: bytes, error: str, hint: str
):
    Path("presets").mkdir()
    Path("presets/x.toml").write_bytes(content)
    for args in (("preset", "validate", "presets/x.toml"), (*GENERATE, "--preset", "x")):
        result = wancli(*args)
        message, advice = complaint(result)
        assert result.code == 2
        assert error in message
        assert hint in advice


@pytest.mark.parametrize("command", ["show", "repro"])
def test_a_file_without_a_record_is_rejected(wancli: Wancli, command: str):
    assert "not found" in complaint(wancli(command, "none.mp4"))[0]
    Path("x.mp4").write_bytes(b"this is no video")
    result = wancli(command, "x.mp4")
    assert result.code == 4
    assert "x.mp4" in complaint(result)[0]
    Path("x.json").write_text("{}")
    assert "no wancli record" in complaint(wancli(command, "x.json"))[0]


def test_decode_rejects_files_without_latents(wancli: Wancli):
    assert wancli("decode", "none.safetensors", "-o", "a.mp4").code == 4
    Path("z.safetensors").write_bytes(b"\0" * 100)
    result = wancli("decode", "z.safetensors", "-o", "a.mp4", "-q")
    assert result.code == 4
    assert "z.safetensors" in complaint(result)[0]


def test_a_model_that_is_not_cached_is_rejected_offline(
    wancli: Wancli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    released = ("--model", "wan2.1-t2v-1.3b", "--force", "--seed", 1, "-o", "a.mp4")
    for command in (
        ("generate", "x", *released),
        ("rollout", "x", "--chunks", 1, *released),
        ("generate", "x", "--model", "some-owner/some-model"),
    ):
        result = wancli(*command)
        assert (result.code, "HF_HUB_OFFLINE is set" in complaint(result)[0]) == (4, True)
    assert wancli("generate", "x", *released, "--dry-run").code == 0


def test_a_file_that_is_not_a_lora_is_rejected_before_anything_loads(wancli: Wancli):
    for name in ("notes.txt", "cut.safetensors", "cut.pt"):
        Path(name).write_bytes(b"hello")
        result = wancli(*GENERATE, "--lora", name)
        assert (result.code, name in complaint(result)[0]) == (4, True)
