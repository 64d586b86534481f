"""Weights in one file, in every naming and packaging: loaded bit for bit, or refused by name."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import Wancli
from tests.fakes import tiny_folder
from tests.models.test_convert import NAMES, WEIGHTS, Tensors, config_file, expected
from wancli.catalog.local import find_spec, spec_of_folder
from wancli.catalog.weight_files import add_weight_files
from wancli.config.settings import Machine
from wancli.errors import InputError, ModelError, PlanError, SettingsError, WancliError
from wancli.models.convert import convert
from wancli.models.load import load_pipeline

RUN = ("generate", "a red circle", "--steps", 1, "--frames", 5, "--size", "32x32", "--seed", 1)
QUERY = "blocks.0.self_attn.q.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of the reference weights, by `model convert`."""
    place = tmp_path_factory.mktemp("converted")
    convert(WEIGHTS, place / "model", config=config_file(place))
    return place / "model"


def loaded(folder: Path, *files: object, dtype: str = "float32") -> Tensors:
    spec = add_weight_files(spec_of_folder(folder), [str(file) for file in files])
    machine = Machine.model_validate({"device": "cpu", "dtype": dtype})
    pipeline = load_pipeline(spec, machine, ("transformer",)).pipeline
    return dict(pipeline.transformer.state_dict())


def same(ours: Tensors, theirs: Tensors) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor)
        for name, tensor in theirs.items()
    )


def original() -> Tensors:
    return load_file(WEIGHTS)


def original_names(tensors: Tensors) -> Tensors:
    """The tensors of a tiny model of diffusers in the naming of Wan's code."""
    names = {new: old for old, new in NAMES.items()}
    made = {}
    for name, tensor in tensors.items():
        block = re.match(r"blocks\.\d+\.", name)
        start = block[0] if block else ""
        first = "blocks.0." if block else ""
        old = names[first + name.removeprefix(start)]
        made[start + old.removeprefix(first)] = tensor
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "model."])
@pytest.mark.parametrize("make", [original, expected])
def test_every_naming_and_packaging_loads_what_the_folder_loads(
    make: Callable[[], Tensors], prefix: str, dtype: str, folder: Path, tmp_path: Path
):
    save_file(
        {prefix + name: tensor for name, tensor in make().items()}, tmp_path / "x.safetensors"
    )
    assert same(
        loaded(folder, tmp_path / "x.safetensors", dtype=dtype), loaded(folder, dtype=dtype)
    )


def test_the_other_parts_of_a_whole_checkpoint_are_not_read(folder: Path, tmp_path: Path):
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in original().items()}
    save_file(whole | {"vae.decoder.conv1.weight": torch.ones(1)}, tmp_path / "x.safetensors")
    assert same(loaded(folder, tmp_path / "x.safetensors"), loaded(folder))


def scaled(tensors: Tensors, kind: str, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensors:
    """The matrices of the blocks in fp8, with scales as ComfyUI and LightX2V write them."""
    made = dict(tensors)
    for name, tensor in tensors.items():
        if not name.startswith("blocks.") or tensor.ndim != 2:
            continue
        wide, layer = tensor.float(), name.removesuffix(".weight")
        scale = wide.abs().amax(1, keepdim=True) if kind == "rows" else wide.abs().max()
        scale = scale / torch.finfo(dtype).max
        made[name] = (wide / scale).to(dtype)
        made[f"{layer}.{'weight_scale' if kind != 'old' else 'scale_weight'}"] = scale
        if kind != "rows":
            made[f"{layer}.{'input_scale' if kind != 'old' else 'scale_input'}"] = torch.ones(())
    return made | ({"scaled_fp8": torch.ones(2, dtype=dtype)} if kind == "old" else {})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("kind", ["old", "new", "rows"])
def test_fp8_weights_are_multiplied_by_their_scales(
    kind: str, dtype: torch.dtype, folder: Path, tmp_path: Path
):
    tensors = scaled(original(), kind, dtype)
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    save_file(whole, tmp_path / "x.safetensors")
    ours, plain = loaded(folder, tmp_path / "x.safetensors"), loaded(folder)
    for old, new in NAMES.items():
        scale = next(
            (tensors[key] for end in ("scale_weight", "weight_scale")
             if (key := f"{old.removesuffix('weight')}{end}") in tensors and "bias" not in old),
            None,
        )  # fmt: skip
        wanted = plain[new] if scale is None else tensors[old].float() * scale
        assert torch.equal(ours[new], wanted), new
    name = NAMES[QUERY]
    assert not torch.equal(ours[name], plain[name])
    assert torch.allclose(ours[name], plain[name], atol=plain[name].abs().max().item() / 8)


def test_fp8_without_scales_is_loaded_as_stored(folder: Path, tmp_path: Path):
    tensors = original() | {QUERY: original()[QUERY].to(torch.float8_e4m3fn)}
    save_file(tensors, tmp_path / "x.safetensors")
    assert torch.equal(
        loaded(folder, tmp_path / "x.safetensors")[NAMES[QUERY]], tensors[QUERY].float()
    )


def without_a_scale() -> Tensors:
    tensors = scaled(original(), "old")
    del tensors["blocks.0.self_attn.q.scale_weight"]
    return tensors


def marked_without_scales() -> Tensors:
    tensors = original() | {QUERY: original()[QUERY].to(torch.float8_e4m3fn)}
    return tensors | {"scaled_fp8": torch.ones(0, dtype=torch.float8_e4m3fn)}


def with_a_lost_scale() -> Tensors:
    return original() | {"blocks.0.self_attn.x.scale_weight": torch.ones(())}


def with_an_odd_scale() -> Tensors:
    return scaled(original(), "old") | {"blocks.0.self_attn.q.scale_weight": torch.ones(3, 3)}


def incomplete() -> Tensors:
    tensors = original()
    del tensors[QUERY], tensors["head.head.bias"]
    tensors["blocks.0.self_attn.k.weight"] = torch.ones(2, 3)
    return tensors | {"blocks.0.extra.weight": torch.ones(1)}


def in_integers() -> Tensors:
    return original() | {QUERY: original()[QUERY].to(torch.int8)}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (without_a_scale, ["fp8 weights without their scale: blocks.0.attn1.to_q.weight."]),
        (marked_without_scales, ["fp8 weights without their scale: blocks.0.attn1.to_q.weight."]),
        (with_a_lost_scale, ["scales without their weight: blocks.0.self_attn.x.scale_weight"]),
        (with_an_odd_scale, ["scales of another kind: blocks.0.self_attn.q.scale_weight [3, 3]"]),
        (
            incomplete,
            [
                "missing: blocks.0.attn1.to_q.weight, proj_out.bias;",
                "unexpected: blocks.0.extra.weight;",
                "of another shape: blocks.0.self_attn.k.weight [2, 3], not [",
            ],
        ),
        (in_integers, [f"of a dtype that is not read: {QUERY} I8"]),
    ],
)
def test_what_is_wrong_with_a_file_is_listed(
    make: Callable[[], Tensors], words: list[str], folder: Path, tmp_path: Path
):
    save_file(make(), tmp_path / "x.safetensors")
    with pytest.raises(ModelError) as error:
        add_weight_files(spec_of_folder(folder), [str(tmp_path / "x.safetensors")])
    assert all(word in str(error.value) for word in words), error.value


def test_a_file_for_another_model_says_which_it_fits(tmp_path: Path):
    demo = find_spec("demo")
    assert demo.folder
    shutil.copy(
        next((demo.folder / "transformer").glob("*.safetensors")), tmp_path / "x.safetensors"
    )
    with pytest.raises(ModelError, match=r"not the transformer of wan2.1-t2v-1.3b") as error:
        add_weight_files(find_spec("wan2.1-t2v-1.3b"), [str(tmp_path / "x.safetensors")])
    assert error.value.hint == "it fits demo"


@pytest.mark.parametrize(
    ("model", "files", "kind", "words"),
    [
        ("wan2.2-t2v-a14b", ["x.safetensors"], PlanError, "which of"),
        ("demo", ["x.safetensors@low"], PlanError, "has one expert"),
        ("demo", ["x.safetensors", "x.safetensors"], SettingsError, "has a file already"),
        ("demo", ["no.safetensors"], InputError, "not found"),
        ("demo", ["broken.safetensors"], InputError, "cannot read"),
        ("demo", ["cut.safetensors"], InputError, "cannot read"),
        ("hunyuanvideo", ["x.safetensors"], PlanError, "does not take"),
        ("wan2.2-animate-14b", ["x.safetensors"], PlanError, "does not take"),
    ],
)
def test_a_wrong_file_or_expert_is_refused(
    model: str, files: list[str], kind: type[WancliError], words: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    demo = find_spec("demo")
    assert demo.folder
    content = next((demo.folder / "transformer").glob("*.safetensors")).read_bytes()
    Path("x.safetensors").write_bytes(content)
    Path("cut.safetensors").write_bytes(content[:-1])
    Path("broken.safetensors").write_bytes(b"\0" * 32)
    with pytest.raises(kind, match=words):
        add_weight_files(find_spec(model), files)


def test_a_video_is_made_from_a_file_and_reproduced_from_it_alone(wancli: Wancli, tiny_model: Path):
    """The record has its digest; the model's own transformer is not needed."""
    tensors = load_file(next((tiny_model / "transformer").glob("*.safetensors")))
    shutil.copytree(tiny_model, "bare")
    for path in Path("bare/transformer").glob("*.safetensors"):
        path.unlink()
    save_file(original_names(tensors), "x.safetensors")
    before = Path("x.safetensors").read_bytes()
    plain = json.loads(wancli(*RUN, "--model", tiny_model, "--json", "-o", "a.mp4").out)
    run = (*RUN, "--model", "bare", "--transformer", "x.safetensors")
    result = wancli(*run, "--json", "-o", "b.mp4")
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert record["output"]["framemd5"] == plain["output"]["framemd5"]
    assert "weights" not in plain["request"]
    (weights,) = record["request"]["weights"]
    count = sum(tensor.numel() for tensor in tensors.values())
    assert weights.items() >= {"part": "transformer", "parameters": count}.items()
    assert (weights["bytes"], weights["keys"]) == (4 * count, len(tensors))
    assert Path("x.safetensors").read_bytes() == before
    plan = " ".join(wancli("plan", *run[1:]).out.split())
    assert f"weights of transformer x.safetensors, {4 * count:,} bytes" in plan

    Path("x.safetensors").rename("moved.safetensors")
    result = wancli("repro", "b.mp4", "-o", "c.mp4")
    assert (result.code, "x.safetensors, which is missing" in result.err) == (4, True)
    assert (
        "identical"
        in wancli("repro", "b.mp4", "-o", "c.mp4", "--transformer", "moved.safetensors").err
    )
    changed = original_names(tensors)
    changed["head.head.bias"] = changed["head.head.bias"] + 1
    save_file(changed, "x.safetensors")
    assert wancli("repro", "b.mp4", "-o", "d.mp4").code == 4
    Path("other").mkdir()
    shutil.copy("b.mp4", "other")
    shutil.copy("moved.safetensors", "other/x.safetensors")
    assert "identical" in wancli("repro", "other/b.mp4", "-o", "e.mp4").err


def test_each_expert_may_have_a_file(wancli: Wancli, tmp_path: Path):
    tiny_folder(tmp_path / "two", experts=2)
    for part, name in (("transformer", "high"), ("transformer_2", "low")):
        weights = next((tmp_path / "two" / part).glob("*.safetensors"))
        save_file(original_names(load_file(weights)), f"{name}.safetensors")
    run = (*RUN, "--model", "two", "--json", "-q")
    plain = json.loads(wancli(*run, "-o", "a.mp4").out)
    for weights in Path("two").glob("transformer*/*.safetensors"):
        weights.unlink()
    files = ("--transformer", "high.safetensors@high", "--transformer", "low.safetensors@low")
    result = wancli(*run, *files, "-o", "b.mp4")
    assert result.code == 0, result.err
    assert json.loads(result.out)["output"]["framemd5"] == plain["output"]["framemd5"]
    result = wancli(*run, "--transformer", "low.safetensors@low", "-o", "c.mp4")
    assert (result.code, "two/transformer has no weights" in result.err) == (4, True)
    assert "identical" in wancli("repro", "b.mp4", "-o", "d.mp4").err


def test_a_rollout_resumes_with_a_file_that_has_moved(wancli: Wancli, tiny_model: Path):
    weights = next((tiny_model / "transformer").glob("*.safetensors"))
    shutil.copy(weights, "x.safetensors")
    run = (
        "rollout", "a red circle", "--model", tiny_model, "--size", "32x32", "--seed", 1,
        "--chunk-frames", 1, "--steps-list", "1000", "--force", "-o", "a.mp4",
    )  # fmt: skip
    result = wancli(*run, "--chunks", 1, "--transformer", "x.safetensors")
    assert result.code == 0, result.err
    Path("x.safetensors").rename("moved.safetensors")
    resume = ("--chunks", 2, "--resume")
    result = wancli(*run, *resume, "--transformer", "moved.safetensors")
    assert result.code == 0, result.err
    tensors = load_file("moved.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, "moved.safetensors")
    result = wancli(*run, "--resume", "--chunks", 3, "--transformer", "moved.safetensors")
    assert (result.code, "weights was" in result.err) == (2, True)
