"""Checkpoints in their authors' naming, converted by the key map of tests/parity."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from wancli.catalog.local import find_spec
from wancli.config.settings import Machine
from wancli.errors import InputError, ModelError, OutputError, UsageError
from wancli.models.convert import convert, read_sizes
from wancli.models.load import load_pipeline
from wancli.planning.lora import Lora
from wancli.utils.files import whole_folder

PARITY = Path(__file__).parents[1] / "parity"
WEIGHTS = PARITY / "weights_original_names.safetensors"
MODEL = json.loads((PARITY / "model.json").read_text())
SIZES = MODEL["diffusers_WanTransformer3DModel_config"]
PATCH = "patch_embedding.weight"
NAMES: dict[str, str] = MODEL["key_map_original_to_diffusers"]

Tensors = dict[str, torch.Tensor]


def config_file(folder: Path, **entries: Any) -> Path:
    """A config file; by default with the number of heads, which no tensor determines."""
    path = folder / "stated.json"
    path.write_text(json.dumps(entries or {"num_heads": 4}))
    return path


def converted(out: Path) -> Tensors:
    return load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")


def same(ours: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return ours.keys() == expected.keys() and all(
        ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor)
        for name, tensor in expected.items()
    )


def expected() -> Tensors:
    original = load_file(WEIGHTS)
    return {new: original[old] for old, new in NAMES.items()}


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def fsdp_names(tensors: Tensors) -> Tensors:
    """Names as FSDP writes them: with its prefix before the model and before every block."""
    block, fsdp = "blocks.", "_fsdp_wrapped_module."
    names = {}
    for name in tensors:
        head, _, tail = name.removeprefix(block).partition(".")
        names[name] = f"{block}{head}.{fsdp}{tail}" if name.startswith(block) else name
    return {f"model.{fsdp}{names[name]}": tensor for name, tensor in tensors.items()}


def publish(kind: str, folder: Path) -> Path:
    """The reference weights in one of the formats that authors publish."""
    tensors = load_file(WEIGHTS)
    other = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    if kind == "shards":
        names = sorted(tensors)
        for index, part in enumerate((names[:50], names[50:])):
            shard = {name: tensors[name] for name in part}
            save_file(prefixed(shard, "model."), folder / f"model-{index}.safetensors")
        return folder
    state: Any = {
        "generator_ema": {
            "generator": prefixed(other, "model."),
            "generator_ema": prefixed(tensors, "model."),
            "critic": other,
            "step": 600,
        },
        "generator": {"generator": prefixed(tensors, "model."), "critic": other},
        "fsdp": {"generator": other, "generator_ema": fsdp_names(tensors)},
        "bare": tensors,
        "rcm": prefixed({n: t.flatten(1) if n == PATCH else t for n, t in tensors.items()}, "net."),
        "old pickle": {"generator_ema": tensors},
    }[kind]
    torch.save(state, folder / "x.pt", _use_new_zipfile_serialization=kind != "old pickle")
    return folder / "x.pt"


@pytest.mark.parametrize(
    "kind", ["generator_ema", "generator", "fsdp", "bare", "rcm", "old pickle", "shards"]
)
def test_every_tensor_is_renamed_by_the_key_map(kind: str, tmp_path: Path):
    (tmp_path / "in").mkdir()
    convert(publish(kind, tmp_path / "in"), tmp_path / "out", config=config_file(tmp_path))
    assert same(converted(tmp_path / "out"), expected())


def test_the_entry_of_a_pickle_can_be_chosen(tmp_path: Path):
    tensors = load_file(WEIGHTS)
    averaged = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    torch.save({"generator_ema": averaged, "generator": tensors}, tmp_path / "x.pt")
    config = config_file(tmp_path)
    convert(tmp_path / "x.pt", tmp_path / "out", config=config, entry="generator")
    assert same(converted(tmp_path / "out"), expected())
    for source, error in (
        (tmp_path / "x.pt", "has entries generator_ema, gen"),
        (WEIGHTS, "not a pi"),
    ):
        with pytest.raises(InputError, match=error):
            convert(source, tmp_path / "other", config=config, entry="critic")


@pytest.mark.parametrize("kind", ["pickle", "safetensors"])
def test_a_lora_is_merged_into_the_copy_alone(kind: str, tmp_path: Path):
    tensors, layer = load_file(WEIGHTS), "blocks.1.self_attn.q"
    source = tmp_path / {"pickle": "x.pt", "safetensors": "x.safetensors"}[kind]
    (torch.save if kind == "pickle" else save_file)(tensors, source)
    before = source.read_bytes()
    numbers = torch.Generator().manual_seed(0)
    up, down = torch.randn(64, 2, generator=numbers), torch.randn(2, 64, generator=numbers)
    save_file(
        {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, tmp_path / "l.safetensors"
    )
    lora = Lora(tmp_path / "l.safetensors", scale=0.5)
    convert(source, tmp_path / "out", config=config_file(tmp_path), loras=[lora])
    merged = tensors[f"{layer}.weight"].double() + 0.5 * up.double() @ down.double()
    changed = {NAMES[f"{layer}.weight"]: merged.bfloat16()}
    assert same(converted(tmp_path / "out"), expected() | changed)
    assert source.read_bytes() == before


def test_diffusers_loads_a_converted_model_without_missing_or_unexpected_keys(tmp_path: Path):
    result = convert(WEIGHTS, tmp_path / "out", config=config_file(tmp_path))
    model, report = WanTransformer3DModel.from_pretrained(
        tmp_path / "out", subfolder="transformer", output_loading_info=True
    )
    assert not any(report.values())
    assert same(dict(model.state_dict()), {k: t.float() for k, t in expected().items()})
    assert result.config.items() >= SIZES.items()
    assert {k: v for k, v in model.config.items() if k in result.config} == result.config
    assert result.parameters == sum(p.numel() for p in model.parameters())
    assert result.dtype == "bfloat16"


def test_diffusers_names_are_unchanged(tmp_path: Path):
    save_file(expected(), tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "out", config=config_file(tmp_path))
    assert same(converted(tmp_path / "out"), expected())


def test_dtypes_are_kept_and_transposed_tensors_are_packed(tmp_path: Path):
    tensors = load_file(WEIGHTS)
    tensors["head.modulation"] = tensors["head.modulation"].float() / 3
    tensors["head.head.weight"] = tensors["head.head.weight"].half().t().contiguous().t()
    torch.save(tensors, tmp_path / "x.pt")
    result = convert(tmp_path / "x.pt", tmp_path / "out", config=config_file(tmp_path))
    assert same(converted(tmp_path / "out"), {NAMES[k]: t for k, t in tensors.items()})
    assert result.dtype == "bfloat16, float16, float32"


def test_image_to_video_keys_are_renamed(tmp_path: Path):
    tensors, image, dim = load_file(WEIGHTS), 40, 64
    numbers = torch.Generator().manual_seed(0)
    shapes = {
        "img_emb.emb_pos": ("image_embedder.pos_embed", (1, 6, image)),
        "img_emb.proj.0.weight": ("image_embedder.norm1.weight", (image,)),
        "img_emb.proj.0.bias": ("image_embedder.norm1.bias", (image,)),
        "img_emb.proj.1.weight": ("image_embedder.ff.net.0.proj.weight", (image, image)),
        "img_emb.proj.1.bias": ("image_embedder.ff.net.0.proj.bias", (image,)),
        "img_emb.proj.3.weight": ("image_embedder.ff.net.2.weight", (dim, image)),
        "img_emb.proj.3.bias": ("image_embedder.ff.net.2.bias", (dim,)),
        "img_emb.proj.4.weight": ("image_embedder.norm2.weight", (dim,)),
        "img_emb.proj.4.bias": ("image_embedder.norm2.bias", (dim,)),
    }
    names = {old: (f"condition_embedder.{new}", shape) for old, (new, shape) in shapes.items()}
    for layer in range(3):
        old, new = f"blocks.{layer}.cross_attn", f"blocks.{layer}.attn2"
        for part, proj in (("k_img", "add_k_proj"), ("v_img", "add_v_proj")):
            names[f"{old}.{part}.weight"] = (f"{new}.{proj}.weight", (dim, dim))
            names[f"{old}.{part}.bias"] = (f"{new}.{proj}.bias", (dim,))
        names[f"{old}.norm_k_img.weight"] = (f"{new}.norm_added_k.weight", (dim,))
    tensors |= {old: torch.randn(shape, generator=numbers) for old, (_, shape) in names.items()}
    torch.save({"generator": tensors}, tmp_path / "x.pt")
    result = convert(tmp_path / "x.pt", tmp_path / "out", config=config_file(tmp_path))
    added = {new: tensors[old] for old, (new, _) in names.items()}
    assert same(converted(tmp_path / "out"), expected() | added)
    sizes = {"image_dim": image, "added_kv_proj_dim": dim, "pos_embed_seq_len": 6}
    assert result.config.items() >= sizes.items()


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 3},
        {"num_attention_heads": 40, "ffn_dim": 13824, "in_channels": 36},
        {"num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48},
        {"num_attention_heads": 8, "cross_attn_norm": False, "patch_size": [2, 4, 4]},
    ],
    ids=["1.3B", "14B", "5B", "no norm"],
)
def test_sizes_of_released_models_are_inferred_from_shapes(sizes: dict[str, Any]):
    with torch.device("meta"):
        model = WanTransformer3DModel(**({"num_layers": 1} | sizes))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    inferred = read_sizes(shapes, {}, Path("x.pt"))
    actual = {name: value for name, value in model.config.items() if name in inferred}
    assert inferred == actual | {"patch_size": list(actual["patch_size"])}
    assert len(inferred) > len(sizes)


@pytest.mark.parametrize(
    "entries",
    [
        MODEL["original_CausalWanModel_kwargs"],
        SIZES,
        {"attention_head_dim": 16},
        {"num_heads": 4, "qk_norm": True, "local_attn_size": -1, "_class_name": "CausalWanModel"},
    ],
    ids=["original", "diffusers", "width", "heads"],
)
def test_a_config_may_use_original_or_diffusers_names(entries: dict[str, Any], tmp_path: Path):
    result = convert(WEIGHTS, tmp_path / "out", config=config_file(tmp_path, **entries))
    assert result.config["num_attention_heads"] == 4
    assert result.config["attention_head_dim"] == 16


def test_config_entries_that_shapes_do_not_determine_are_kept(tmp_path: Path):
    path = config_file(tmp_path, num_heads=2, eps=1e-5, rope_max_seq_len=2048)
    convert(WEIGHTS, tmp_path / "out", config=path)
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert (config["num_attention_heads"], config["attention_head_dim"]) == (2, 32)
    assert (config["eps"], config["rope_max_seq_len"]) == (1e-5, 2048)


@pytest.mark.parametrize(
    ("entries", "error"),
    [
        ({"num_heads": 4, "ffn_dim": 256}, "ffn_dim 256, but .* has 128"),
        ({"num_heads": 4, "dim": 1536}, "dim 1536, but .* has 64"),
        ({"num_heads": 4, "in_dim": 36}, "in_channels 36, but .* has 16"),
        ({"num_heads": 4, "num_layers": 30}, "num_layers 30, but .* has 3"),
        ({"num_heads": 4, "patch_size": [1, 1, 1]}, r"patch_size \[1, 1, 1\], but .* \[1, 2, 2\]"),
        ({"num_heads": 4, "qk_norm": False}, "qk_norm False, but .* has rms_norm_across_heads"),
        ({"num_heads": 4, "attention_head_dim": 32}, "attention_head_dim 32, but .* has 16"),
        ({"num_heads": 5}, "dim 64, which cannot be split over 5 heads"),
        ({"num_heads": 64}, "cannot be split over 64 heads"),
        ({"attention_head_dim": 128}, "cannot be split over 0 heads"),
        ({"eps": 1e-6}, "has dim 64, but does not record how many"),
    ],
)
def test_a_config_that_contradicts_the_weights_is_rejected(
    entries: dict[str, Any], error: str, tmp_path: Path
):
    with pytest.raises(ModelError, match=error):
        convert(WEIGHTS, tmp_path / "out", config=config_file(tmp_path, **entries))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("entries", "error", "hint"),
    [
        ({"num_head": 4}, "unknown key 'num_head'", "'num_heads'"),
        ({"num_heads": 0}, "num_attention_heads 0", "positive int"),
        ({"num_heads": "4"}, "num_attention_heads '4'", "positive int"),
        ({"num_heads": 4.0}, "num_attention_heads 4.0", "positive int"),
        ({"num_heads": True}, "num_attention_heads True", "positive int"),
        ({"eps": -1.0}, "eps -1.0", "positive float"),
        ({"num_heads": 4, "num_attention_heads": 2}, "num_attention_heads twice", "remove"),
    ],
)
def test_a_config_with_an_invalid_value_is_rejected(
    entries: dict[str, Any], error: str, hint: str, tmp_path: Path
):
    with pytest.raises(InputError, match=error) as caught:
        convert(WEIGHTS, tmp_path / "out", config=config_file(tmp_path, **entries))
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    "key", ["blocks.0.norm3.weight", "blocks.2.modulation", "head.head.weight", "head.head.bias"]
)
def test_only_the_missing_key_is_named(key: str, tmp_path: Path):
    tensors = load_file(WEIGHTS)
    del tensors[key]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=f"missing[^:]*: {NAMES[key]}\\.$"):
        convert(tmp_path / "x.safetensors", tmp_path / "out", config=config_file(tmp_path))


def test_duplicate_keys_are_rejected_not_dropped(tmp_path: Path):
    tensors = load_file(WEIGHTS)
    torch.save(tensors | prefixed(tensors, "model."), tmp_path / "x.pt")
    with pytest.raises(ModelError, match="duplicate keys"):
        convert(tmp_path / "x.pt", tmp_path / "out", config=config_file(tmp_path))
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        shutil.copy(WEIGHTS, tmp_path / "in" / f"{name}.safetensors")
    with pytest.raises(ModelError, match="in two files"):
        convert(tmp_path / "in", tmp_path / "out", config=config_file(tmp_path))


@pytest.fixture
def tiny(tiny_model: Path) -> Path:
    """The transformer weights of the tiny model, whose folder serves as their base."""
    return tiny_model / "transformer" / "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("can_link", [True, False])
def test_a_base_completes_the_model_folder(
    tiny: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_link: bool
):
    if not can_link:

        def refuse(*_: object) -> None:
            raise OSError("cross-device link")

        monkeypatch.setattr(os, "link", refuse)
    tensors = {name: tensor + 1 for name, tensor in load_file(tiny).items()}
    save_file(tensors, tmp_path / "x.safetensors")
    convert(
        tmp_path / "x.safetensors",
        tmp_path / "out",
        config=config_file(tmp_path, num_heads=2),
        base=tiny_model,
    )
    loaded = load_pipeline(find_spec(str(tmp_path / "out")), Machine(device="cpu"))
    assert same(dict(loaded.pipeline.transformer.state_dict()), tensors)
    weights = Path("vae", "diffusion_pytorch_model.safetensors")
    ours, theirs = tmp_path / "out" / weights, tiny_model / weights
    assert ours.read_bytes() == theirs.read_bytes()
    assert ours.samefile(theirs) == can_link
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted(path.name for path in tiny_model.iterdir())


@pytest.mark.parametrize("damage", ["two experts", "no scheduler", "another width"])
def test_a_base_that_does_not_match_is_rejected(
    tiny: Path, tiny_model: Path, tmp_path: Path, damage: str
):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    error = {"two experts": "two transformers", "no scheduler": "has no scheduler"}
    if damage == "two experts":
        index = json.loads((base / "model_index.json").read_text())
        index["transformer_2"] = index["transformer"]
        (base / "model_index.json").write_text(json.dumps(index))
    elif damage == "no scheduler":
        shutil.rmtree(base / "scheduler")
    source, heads = (WEIGHTS, 4) if damage == "another width" else (tiny, 2)
    with pytest.raises(ModelError, match=error.get(damage, "z_dim 4; .* out_channels 16")):
        convert(source, tmp_path / "out", config=config_file(tmp_path, num_heads=heads), base=base)
    assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_only_the_old_folder(tiny: Path, tiny_model: Path, tmp_path: Path):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    (base / "tokenizer" / "lost.json").symlink_to(tmp_path / "nowhere")
    config = config_file(tmp_path, num_heads=2)
    convert(tiny, tmp_path / "out", config=config)
    before = sorted(tmp_path.rglob("*"))
    weights = converted(tmp_path / "out")
    for out, overwrite in (("out", True), ("new", False)):
        with pytest.raises(OutputError, match=f"cannot write .*{out}"):
            convert(tiny, tmp_path / out, config=config, base=base, overwrite=overwrite)
    assert sorted(tmp_path.rglob("*")) == before
    assert same(converted(tmp_path / "out"), weights)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path):
    def interrupted(out: Path) -> None:
        with whole_folder(out, hint="", overwrite=False) as part:
            (part / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_old_folder_is_restored_if_the_new_one_is_lost(tmp_path: Path):
    def lost(out: Path) -> None:
        with whole_folder(out, hint="", overwrite=True) as part:
            part.rmdir()

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(OutputError, match="cannot write"):
        lost(tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path: Path):
    def late(out: Path) -> None:
        with whole_folder(out, hint="", overwrite=False):
            out.mkdir()
            (out / "mine").write_text("mine")

    with pytest.raises(OutputError, match="cannot write"):
        late(tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_overwrite_replaces_only_converted_models(tmp_path: Path):
    out, config = tmp_path / "out", config_file(tmp_path)
    convert(WEIGHTS, out, config=config)
    with pytest.raises(UsageError, match="exists"):
        convert(WEIGHTS, out, config=config)
    stale = out / "transformer" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    stale.write_text("stale")
    convert(WEIGHTS, out, config=config, overwrite=True)
    assert not stale.exists()
    assert same(converted(out), expected())
    with pytest.raises(UsageError, match="would be deleted"):
        convert(out / "transformer", out, config=config, overwrite=True)
    for name in ("notes.txt", "transformer/notes.txt", "vae/mine/config.json"):
        mine = out / name
        mine.parent.mkdir(parents=True, exist_ok=True)
        mine.write_text("mine")
        with pytest.raises(UsageError, match=f"holds {name}, which is not of"):
            convert(WEIGHTS, out, config=config, overwrite=True)
        assert mine.read_text() == "mine"
        mine.unlink()


def test_weights_have_the_file_mode_of_the_config(tmp_path: Path):
    convert(WEIGHTS, tmp_path / "out", config=config_file(tmp_path))
    modes = {path.stat().st_mode for path in (tmp_path / "out" / "transformer").iterdir()}
    assert len(modes) == 1
