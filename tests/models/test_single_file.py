"""Weights in one file, in every naming and packaging: loaded bit for bit, or refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_wan_transformer_to_diffusers,
    convert_wan_vae_to_diffusers,
)
from safetensors.torch import load_file, save_file

from tests.conftest import Made, Wancli
from tests.fakes import tiny_folder, tiny_vae
from tests.models.test_convert import NAMES, WEIGHTS, Tensors, config_file, expected
from wancli.catalog.local import find_spec, spec_of_folder
from wancli.catalog.part_names import text_encoder_name, vae_name
from wancli.catalog.specs import DEMO_FOLDER
from wancli.catalog.tasks import ENDS, IMAGE, TEXT, VACE
from wancli.catalog.wan_layers import from_original
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
    pipeline = load_pipeline(spec, machine, ("transformer",), task=spec.tasks[0]).pipeline
    return dict(pipeline.transformer.state_dict())


def same(ours: Tensors, theirs: Tensors) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor)
        for name, tensor in theirs.items()
    )


def original() -> Tensors:
    return load_file(WEIGHTS)


# Layers of Wan's code: wan/modules/model.py, and VACE's vace/models/wan/wan_vace.py.
ATTENTION = ("q", "k", "v", "o", "norm_q", "norm_k", "k_img", "v_img", "norm_k_img")
IN_BLOCK = (
    "modulation", "norm3", "ffn.0", "ffn.2", "before_proj", "after_proj",
    *(f"{kind}_attn.{layer}" for kind in ("self", "cross") for layer in ATTENTION),
)  # fmt: skip
OUTSIDE = (
    "patch_embedding", "vace_patch_embedding", "time_embedding.0", "time_embedding.2",
    "text_embedding.0", "text_embedding.2", "time_projection.1", "head.modulation", "head.head",
    *(f"img_emb.proj.{index}" for index in (0, 1, 3, 4)), "img_emb.emb_pos",
)  # fmt: skip


def original_names(tensors: Tensors) -> Tensors:
    """The tensors of a tiny transformer of diffusers in the naming of Wan's code."""
    blocks = [f"{kind}.{index}" for kind in ("blocks", "vace_blocks") for index in range(2)]
    layers = [*OUTSIDE, *(f"{block}.{layer}" for block in blocks for layer in IN_BLOCK)]
    old = [name for layer in layers for name in (layer, f"{layer}.weight", f"{layer}.bias")]
    names = {from_original(name): name for name in old}
    return {names[name]: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("make", "prefix", "dtype"),
    [
        (original, "", "bfloat16"),
        (original, "model.diffusion_model.", "float32"),
        (expected, "diffusion_model.", "bfloat16"),
        (expected, "model.", "float32"),
    ],
)
def test_every_naming_and_packaging_loads_what_the_folder_loads(
    make: Callable[[], Tensors], prefix: str, dtype: str, folder: Path, tmp_path: Path
):
    save_file(
        {prefix + name: tensor for name, tensor in make().items()}, tmp_path / "x.safetensors"
    )
    assert same(
        loaded(folder, tmp_path / "x.safetensors", dtype=dtype), loaded(folder, dtype=dtype)
    )


@pytest.mark.parametrize("task", [TEXT, IMAGE, ENDS, VACE])
def test_every_kind_of_transformer_is_the_same_after_a_way_to_the_original_names_and_back(
    task: str, tmp_path: Path
):
    tiny_folder(tmp_path / "model", task)
    tensors = weights_of(tmp_path / "model", "transformer")
    original = original_names(tensors)
    theirs = convert_wan_transformer_to_diffusers(dict(original))
    theirs.pop("img_emb.emb_pos", None)  # which its script converts, and this does not
    assert theirs.keys() == tensors.keys() - {"condition_embedder.image_embedder.pos_embed"}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in theirs.items())
    save_file(original, tmp_path / "x.safetensors")
    assert same(loaded(tmp_path / "model", tmp_path / "x.safetensors"), tensors)


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


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("old", torch.float8_e4m3fn),
        ("new", torch.float8_e5m2),
        ("rows", torch.float8_e4m3fn),
    ],
)
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


def marked_by_layer() -> Tensors:
    tensors = original() | {QUERY: original()[QUERY].to(torch.float8_e4m3fn)}
    return tensors | {QUERY.replace("weight", "comfy_quant"): torch.ones(3, dtype=torch.uint8)}


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
        (marked_by_layer, ["fp8 weights without their scale: blocks.0.attn1.to_q.weight."]),
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


def test_a_model_in_integers_is_not_said_to_be_another(tmp_path: Path):
    demo = find_spec("demo")
    assert demo.folder
    weights = load_file(next((demo.folder / "transformer").glob("*.safetensors")))
    name = "blocks.0.attn1.to_q.weight"
    save_file(weights | {name: weights[name].to(torch.int8)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=f"a dtype that is not read: {name} I8") as error:
        add_weight_files(demo, [str(tmp_path / "x.safetensors")])
    assert "GGUF" in error.value.hint


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


def test_a_video_is_made_from_a_file_and_reproduced_from_it_alone(
    wancli: Wancli, made: Made, tiny_model: Path
):
    """The record has its digest; the model's own transformer is not needed."""
    tensors = load_file(next((tiny_model / "transformer").glob("*.safetensors")))
    shutil.copytree(tiny_model, "bare")
    for path in Path("bare/transformer").glob("*.safetensors"):
        path.unlink()
    save_file(original_names(tensors), "x.safetensors")
    before = Path("x.safetensors").read_bytes()
    made(*RUN, "--model", tiny_model, "-o", "a.mp4")
    plain = json.loads(Path("a.json").read_text())
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
    assert (result.code, "weights.transformer was" in result.err) == (2, True)


def vae_names(tensors: Tensors, *, blocks: int, nested: bool) -> Tensors:
    """A tiny VAE of diffusers in the naming of Wan 2.1's code or, nested, of Wan 2.2's."""
    inner = ("residual.0", "residual.2", "residual.3", "residual.6", "shortcut", "resample.1")
    layers = ["conv1", "conv2"]
    for half, way in (("encoder", "down"), ("decoder", "up")):
        ends = ("conv1", "head.0", "head.2", *(f"middle.1.{x}" for x in ("norm", "to_qkv", "proj")))
        places = ["middle.0", "middle.2"]
        for index in range(16):
            outer = f"{way}samples.{index}"
            places += [f"{outer}.{way}samples.{n}" for n in range(4)] if nested else [outer]
        ends += tuple(f"{place}.{x}" for place in places for x in (*inner, "time_conv"))
        layers += [f"{half}.{end}" for end in ends]
    old = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias", "gamma")]
    names = {vae_name(name, res_blocks=blocks): name for name in reversed(old)}
    return {names[name]: tensor for name, tensor in tensors.items()}


def text_names(tensors: Tensors) -> Tensors:
    """A tiny UMT5 encoder in the naming of Wan's code."""
    layers = ["token_embedding", "norm"]
    inner = ("norm1", "norm2", "pos_embedding.embedding", "ffn.gate.0", "ffn.fc1", "ffn.fc2")
    for index in range(4):
        layers += [f"blocks.{index}.{x}" for x in (*inner, *(f"attn.{x}" for x in "qkvo"))]
    names = {text_encoder_name(f"{layer}.weight"): f"{layer}.weight" for layer in layers}
    return {names[name]: tensor for name, tensor in tensors.items()}


def weights_of(folder: Path, part: str) -> Tensors:
    return load_file(next((folder / part).glob("*.safetensors")))


def test_a_vae_of_wan_2_1_is_renamed_as_diffusers_renames_it():
    vae = tiny_vae(num_res_blocks=2, dim_mult=[1, 2, 4, 4])  # as released; it knows no other
    old = vae_names(vae.state_dict(), blocks=2, nested=False)
    theirs = convert_wan_vae_to_diffusers({name: name for name in old})
    assert theirs == {vae_name(name, res_blocks=2): name for name in old}


@pytest.mark.parametrize("model", ["tiny", "demo"])  # VAEs of the kinds of Wan 2.1 and 2.2
@pytest.mark.parametrize(
    ("naming", "dtype"),
    [("original", "float32"), ("library", "float32"), ("whole", "bfloat16")],
)
def test_a_vae_and_a_text_encoder_load_what_the_folder_loads(
    model: str, dtype: str, naming: str, tiny_model: Path, tmp_path: Path
):
    spec = find_spec("demo" if model == "demo" else str(tiny_model))
    assert spec.folder
    vae, text = weights_of(spec.folder, "vae"), weights_of(spec.folder, "text_encoder")
    if naming != "library":
        blocks = spec.wan.vae.res_blocks
        vae, text = vae_names(vae, blocks=blocks, nested=model == "demo"), text_names(text)
    if naming == "whole":
        prefix = "text_encoders.umt5xxl.transformer."
        whole = {f"vae.{name}": tensor for name, tensor in vae.items()}
        vae = text = whole | {f"{prefix}{name}": tensor for name, tensor in text.items()}
    text = text | {"spiece_model": torch.zeros(3, dtype=torch.uint8)}
    save_file(vae, tmp_path / "vae.safetensors")
    save_file(text, tmp_path / "text.safetensors")
    files = {"vae": tmp_path / "vae.safetensors", "text_encoder": tmp_path / "text.safetensors"}
    named = {part: str(path) for part, path in files.items()}
    machine = Machine.model_validate({"device": "cpu", "dtype": dtype, "vae_dtype": dtype})
    ours = load_pipeline(add_weight_files(spec, **named), machine).pipeline
    theirs = load_pipeline(spec, machine).pipeline
    for part in files:
        state = dict(getattr(theirs, part).state_dict())
        assert same(dict(getattr(ours, part).state_dict()), state), part
    assert ours.text_encoder.shared.weight is ours.text_encoder.encoder.embed_tokens.weight


def test_a_text_encoder_in_fp8_is_multiplied_by_its_scales(tiny_model: Path, tmp_path: Path):
    name = "encoder.block.0.layer.0.SelfAttention.q"
    tensors = weights_of(tiny_model, "text_encoder")
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.float8_e4m3fn)
    save_file(tensors | {f"{name}.scale_weight": torch.tensor(0.5)}, tmp_path / "x.safetensors")
    spec = add_weight_files(
        find_spec(str(tiny_model)), text_encoder=str(tmp_path / "x.safetensors")
    )
    pipeline = load_pipeline(spec, Machine(device="cpu", dtype="float32")).pipeline
    ours = pipeline.text_encoder.state_dict()[f"{name}.weight"]
    assert torch.equal(ours, tensors[f"{name}.weight"].float() * 0.5)


def test_wrong_files_of_a_vae_and_a_text_encoder_are_refused(wancli: Wancli, tiny_model: Path):
    tensors = weights_of(tiny_model, "text_encoder")
    del tensors["shared.weight"]
    save_file(tensors, "text.safetensors")
    vae = weights_of(tiny_model, "vae")
    del vae["quant_conv.weight"]
    save_file(vae, "vae.safetensors")
    run = ("plan", *RUN[1:], "--model", tiny_model)
    for flag, name, lacking in (
        ("--text-encoder", "text", "shared.weight"), ("--vae", "vae", "quant_conv.weight"),
    ):  # fmt: skip
        result = wancli(*run, flag, f"{name}.safetensors")
        assert result.code == 4
        assert f"keys missing: {lacking}." in result.err
    shutil.copy(next(DEMO_FOLDER.glob("vae/*.safetensors")), "vae.safetensors")
    result = wancli(*run, "--vae", "vae.safetensors")
    assert (result.code, "it fits demo" in result.err) == (4, True)
    result = wancli("generate", "x", "--model", "hunyuanvideo", "--vae", "vae.safetensors")
    assert (result.code, "does not take its vae" in result.err) == (2, True)


def test_all_parts_may_come_from_files_and_are_found_again(
    wancli: Wancli, made: Made, tiny_model: Path
):
    shutil.copytree(tiny_model, "bare")
    flags: list[object] = []
    for part in ("transformer", "vae", "text_encoder"):
        next(Path("bare", part).glob("*.safetensors")).rename(f"{part}.safetensors")
        flags += [f"--{part.replace('_', '-')}", f"{part}.safetensors"]
    run = (*RUN, "--json", "-q")
    made(*RUN, "--model", tiny_model, "-o", "a.mp4")
    plain = json.loads(Path("a.json").read_text())
    save = ("--save-latents", "b.safetensors")
    result = wancli(*run, "--model", "bare", *flags, "-o", "b.mp4", *save)
    assert result.code == 0, result.err
    assert json.loads(result.out)["output"]["framemd5"] == plain["output"]["framemd5"]
    assert wancli("decode", "b.safetensors", "-o", "d.mp4").code == 0
    Path("there").mkdir()
    for part in ("transformer", "vae", "text_encoder"):
        Path(f"{part}.safetensors").rename(Path("there", f"{part}.safetensors"))
    shutil.copy("b.mp4", "there")
    assert "identical" in wancli("repro", "there/b.mp4", "-o", "c.mp4").err
    assert wancli("decode", "b.safetensors", "-o", "e.mp4").code == 4
    again = ("decode", "b.safetensors", "-o", "e.mp4", "--vae", "there/vae.safetensors")
    assert wancli(*again).code == 0
