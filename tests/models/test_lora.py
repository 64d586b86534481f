"""LoRAs are merged as W + scale * alpha / rank * B @ A + differences, or rejected."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.conftest import Wancli
from tests.fakes import tiny_folder, tiny_pipeline, tiny_transformer
from wancli.catalog.tasks import ANIMATE, IMAGE, VACE, VIDEO
from wancli.errors import InputError, ModelError, SettingsError
from wancli.models.lora import merge_loras
from wancli.planning import lora
from wancli.planning.lora import Lora, find_lora, find_recorded_loras

LAYERS = {
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
    "blocks.1.ffn.0": "blocks.1.ffn.net.0.proj",
}
RANK, ALPHA = 4, 2.0
# As trainers and tools write them: the prefix, whether layers have diffusers' names, the names of
# the factors, and where alpha is (nowhere: B is multiplied by alpha / rank).
PEFT = ("lora_A.weight", "lora_B.weight")
NAMED = ("lora_A.default.weight", "lora_B.default.weight")
KOHYA = ("lora_down.weight", "lora_up.weight")
FORMS = {
    "peft": ("base_model.model.", True, PEFT, ""),
    "peft, its adapter named": ("", False, NAMED, ""),
    "peft, with its config": ("base_model.model.", True, PEFT, "beside"),
    "diffusers": ("transformer.", True, PEFT, ""),
    "diffusers, with metadata": ("transformer.", True, PEFT, "metadata"),
    "old diffusers": ("transformer.", True, ("lora.down.weight", "lora.up.weight"), "key"),
    "Wan": ("", False, PEFT, ""),
    "ComfyUI": ("diffusion_model.", False, KOHYA, "key"),
    "ComfyUI, of peft": ("diffusion_model.", False, PEFT, "key"),
    "kohya": ("lora_unet_", False, KOHYA, "key"),
    "kohya, of diffusers": ("lora_transformer_", True, KOHYA, "key"),
    "LongLive": ("base_model.model.model._fsdp_wrapped_module.", False, NAMED, ""),
}


def factors(**layers: tuple[int, int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Random B and A by layer."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: (
            torch.randn(rows, RANK, generator=generator),
            torch.randn(RANK, columns, generator=generator),
        )
        for name, (rows, columns) in layers.items()
    }


FACTORS = factors(**{"blocks.0.self_attn.q": (24, 24), "blocks.1.ffn.0": (32, 24)})


def random_lora() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A LoRA's tensors by name, and the product that each pair adds to its weight."""
    tensors, added = {}, {}
    for layer, (b, a) in FACTORS.items():
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = a
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = b
        added[f"{LAYERS[layer]}.weight"] = b @ a
    return tensors, added


def write_form(form: str, folder: Path) -> Path:
    """The same LoRA in one of the forms."""
    prefix, diffusers, (down, up), where = FORMS[form]
    tensors, metadata = {}, {}
    for original, (b, a) in FACTORS.items():
        layer = LAYERS[original] if diffusers else original
        if prefix.endswith("_"):
            layer = layer.replace(".", "_")
        tensors[f"{prefix}{layer}.{down}"] = a.clone()
        tensors[f"{prefix}{layer}.{up}"] = b.clone() if where else b * (ALPHA / RANK)
        if where == "key":
            tensors[f"{prefix}{layer}.alpha"] = torch.tensor(ALPHA)
    if where == "metadata":
        metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": ALPHA})}
    if where == "beside":
        (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": ALPHA}))
    if form == "LongLive":
        torch.save({"generator_lora": tensors, "step": torch.tensor(3)}, folder / "x.pt")
        return folder / "x.pt"
    path = folder / ("adapter_model.safetensors" if where == "beside" else "x.safetensors")
    save_file(tensors, path, metadata=metadata)
    return path


def tiny(*, wide: bool = True) -> Any:
    """As much of a pipeline as merging needs; in float64 if `wide`."""
    transformer = tiny_transformer()
    return SimpleNamespace(transformer=transformer.double() if wide else transformer)


def merged(path: Path, scale: float = 0.5, *, wide: bool = False) -> dict[str, Tensor]:
    """The weights that a LoRA changes in the tiny model, in float64 if `wide`."""
    pipeline = tiny(wide=wide)
    before = {name: p.clone() for name, p in pipeline.transformer.state_dict().items()}
    merge_loras(pipeline, [Lora(path, scale)])
    after: dict[str, Tensor] = pipeline.transformer.state_dict()
    assert set(after) == set(before)
    return {name: p for name, p in after.items() if not torch.equal(p, before[name])}


def base() -> Mapping[str, Tensor]:
    """The weights before, in float64."""
    weights: Mapping[str, Tensor] = tiny().transformer.state_dict()
    return weights


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_lora_merges_to_the_same_weights(tmp_path: Path, form: str):
    """B @ A is added in float64, and in float32 every form agrees to the bit."""
    path = write_form(form, tmp_path)
    exact, weights = merged(path, wide=True), base()
    assert set(exact) == {f"{layer}.weight" for layer in LAYERS.values()}
    for original, (b, a) in FACTORS.items():
        name = f"{LAYERS[original]}.weight"
        added = 0.5 * ALPHA / RANK * b.double() @ a.double()
        assert torch.allclose(exact[name], weights[name] + added, rtol=0, atol=1e-14)
    other = tmp_path / "other"
    other.mkdir()
    for name, weight in merged(write_form("kohya", other)).items():
        assert torch.equal(merged(path)[name], weight)


@pytest.mark.parametrize("naming", ["ComfyUI", "diffusers"])
def test_differences_of_weights_biases_norms_and_modulation_are_added(tmp_path: Path, naming: str):
    """lightx2v's files hold `diff` and `diff_b` beside factors, LyCORIS' `w_norm` and `b_norm`."""
    names = {
        "blocks.0.attn1.to_q.weight": ("blocks.0.self_attn.q.diff", "blocks.0.attn1.to_q.diff"),
        "blocks.0.attn1.to_q.bias": ("blocks.0.self_attn.q.diff_b", "blocks.0.attn1.to_q.diff_b"),
        "blocks.1.attn2.norm_k.weight": (
            "blocks.1.cross_attn.norm_k.diff",
            "blocks.1.attn2.norm_k.w_norm",
        ),
        "blocks.1.norm2.bias": ("blocks.1.norm3.diff_b", "blocks.1.norm2.b_norm"),
        "blocks.1.scale_shift_table": ("blocks.1.diff_m", "blocks.1.scale_shift_table.diff"),
        "scale_shift_table": ("head.diff_m", "scale_shift_table.diff"),
        "patch_embedding.weight": ("patch_embedding.diff", "patch_embedding.diff"),
        "proj_out.bias": ("head.head.diff_b", "proj_out.diff_b"),
        "condition_embedder.time_proj.weight": (
            "time_projection.1.diff",
            "condition_embedder.time_proj.diff",
        ),
    }
    weights, generator = base(), torch.Generator().manual_seed(0)
    added = {name: torch.randn(weights[name].shape, generator=generator) for name in names}
    which = 0 if naming == "ComfyUI" else 1
    prefix = ("diffusion_model.", "transformer.")[which]
    tensors = {f"{prefix}{keys[which]}": added[name] for name, keys in names.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    exact = merged(tmp_path / "x.safetensors", wide=True)
    assert set(exact) == set(names)
    for name in names:
        expected = weights[name] + 0.5 * added[name].double()
        assert torch.allclose(exact[name], expected, rtol=0, atol=1e-14), name


def test_factors_of_a_convolution_and_of_a_bias_are_merged(tmp_path: Path):
    generator, name = torch.Generator().manual_seed(0), "diffusion_model.patch_embedding"
    down, up, bias = (
        torch.randn(*shape, generator=generator)
        for shape in ((4, 4, 1, 2, 2), (24, 4, 1, 1, 1), (24,))
    )
    keys = ("lora_down.weight", "lora_up.weight", "lora_up.bias", "alpha")
    values = (down, up, bias, torch.tensor(ALPHA))
    save_file(
        {f"{name}.{k}": v for k, v in zip(keys, values, strict=True)}, tmp_path / "x.safetensors"
    )
    exact, weights = merged(tmp_path / "x.safetensors", wide=True), base()
    product = torch.einsum("or,rcfhw->ocfhw", up.flatten(1).double(), down.double())
    for parameter, change in {"weight": product, "bias": bias.double()}.items():
        expected = weights[f"patch_embedding.{parameter}"] + 0.25 * change
        assert torch.allclose(exact[f"patch_embedding.{parameter}"], expected, rtol=0, atol=1e-14)


def test_the_order_of_two_loras_does_not_matter_to_the_bit(tmp_path: Path):
    paths = []
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            f"diffusion_model.{layer}.{part}.weight": torch.randn(*shape, generator=generator)
            for layer, rows in (("blocks.0.self_attn.q", 24), ("blocks.1.ffn.0", 32))
            for part, shape in (("lora_A", (RANK, 24)), ("lora_B", (rows, RANK)))
        }
        save_file(tensors, tmp_path / f"{name}.safetensors")
        paths.append(tmp_path / f"{name}.safetensors")
    results = []
    loras = [Lora(paths[0], 0.7), Lora(paths[1], -0.3), Lora(paths[0], 1e-3)]
    for order in (loras, loras[::-1]):
        pipeline = tiny()  # in float64, where unrounded sums differ with the order of adding
        merge_loras(pipeline, order)
        results.append(pipeline.transformer.state_dict())
    assert all(torch.equal(weight, results[1][name]) for name, weight in results[0].items())
    weight, pairs = "blocks.0.attn1.to_q.weight", [merged(path, 1.0, wide=True) for path in paths]
    both = base()[weight] + sum(
        scale * (pair[weight] - base()[weight])
        for scale, pair in ((0.701, pairs[0]), (-0.3, pairs[1]))
    )
    assert torch.allclose(results[0][weight], both, rtol=0, atol=1e-13)


def pair(layer: str, rows: int = 24, columns: int = 24) -> dict[str, Tensor]:
    """The factors of one layer, in ComfyUI's form."""
    name = f"diffusion_model.{layer}"
    return {f"{name}.lora_A.weight": torch.ones(2, columns),
            f"{name}.lora_B.weight": torch.ones(rows, 2)}  # fmt: skip


ONE = pair("blocks.0.self_attn.q")
BROKEN: dict[str, tuple[dict[str, Tensor], str]] = {
    "an unknown layer": ({**ONE, **pair("blocks.0.self_attn.gate")},
                         r"no layer 'blocks.*gate' \(diffusion_.*gate.lora_A.weight in the file"),
    "another width": (pair("blocks.0.self_attn.q", 36, 36), r"\[36, 36\], not \[24, 24\]"),
    "a difference of another shape": ({**ONE, "blocks.0.self_attn.q.diff": torch.ones(1, 24)},
                                      r"\[1, 24\], not \[24, 24\]"),
    "an alpha that is complex": ({**ONE, "diffusion_model.blocks.0.self_attn.q.alpha":
                                  torch.ones((), dtype=torch.complex64)}, "is C64"),
    "only layers that the model lacks": (pair("blocks.0.cross_attn.k_img"), "none of its 2 keys"),
    "one factor": ({k: v for k, v in ONE.items() if "lora_A" in k} | pair("blocks.1.ffn.0", 32),
                   "lacks a factor of blocks.0.attn1.to_q"),
    "an alpha alone": ({**ONE, "blocks.0.ffn.0.alpha": torch.tensor(1.0)}, "lacks a factor"),
    "factors of two ranks": ({**ONE, "diffusion_model.blocks.0.self_attn.q.lora_B.weight":
                              torch.ones(24, 3)}, "do not multiply"),
    "a layer twice": ({**ONE, **{k.removeprefix("diffusion_model."): v.clone()
                                 for k, v in ONE.items()}}, "unknown keys"),
    "other keys": ({**ONE, "blocks.0.weight": torch.ones(1)}, "unknown keys: 'blocks.0.weight'"),
    "no LoRA": ({"a": torch.zeros(1)}, "holds no LoRA"),
    "DoRA": ({**ONE, "diffusion_model.blocks.0.self_attn.q.dora_scale": torch.ones(24, 1)},
             "is a DoRA, which is not supported"),
    "peft's DoRA": ({**ONE, "blocks.0.self_attn.q.lora_magnitude_vector": torch.ones(24)},
                    "is a DoRA"),
    "LoKr": ({"lora_unet_blocks_0_self_attn_q.lokr_w1": torch.ones(2, 2)}, "is a LoKr"),
    "LoHa": ({"lora_unet_blocks_0_self_attn_q.hada_w1_a": torch.ones(2, 2)}, "is a LoHa"),
    "integers": ({**ONE, "blocks.0.norm3.diff": torch.ones(24, dtype=torch.int64)}, "is I64"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_applied_is_refused_before_any_weight_changes(tmp_path: Path, case: str):
    tensors, error = BROKEN[case]
    save_file(tensors, tmp_path / "bad.safetensors")
    save_file(ONE, tmp_path / "a.safetensors")
    pipeline = tiny()
    before = pipeline.transformer.blocks[0].attn1.to_q.weight.clone()
    with pytest.raises(ModelError, match=error):
        merge_loras(pipeline, [Lora(tmp_path / f"{name}.safetensors") for name in ("a", "bad")])
    assert torch.equal(pipeline.transformer.blocks[0].attn1.to_q.weight, before)


def test_a_pickle_that_is_broken_is_rejected(tmp_path: Path):
    (tmp_path / "x.pt").write_bytes(b"abc")
    with pytest.raises(InputError, match=r"x\.pt"):
        merge_loras(tiny(), [Lora(tmp_path / "x.pt")])


def test_a_lora_is_a_file_an_expert_and_a_scale(tmp_path: Path):
    path = tmp_path / "a=b.safetensors"
    path.write_bytes(b"")
    assert find_lora(str(path)) == Lora(path, 1.0)
    assert find_lora(f"{path}=0.5") == Lora(path, 0.5)
    assert find_lora(f"{path}@low=0.5") == Lora(path, 0.5, "low")
    assert find_lora(f"{path}@high") == Lora(path, 1.0, "high")
    with pytest.raises(SettingsError):
        find_lora(f"{path}=much")
    with pytest.raises(InputError):
        find_lora("no.safetensors=1")


@pytest.mark.parametrize("after", ["", "@high", "=0.5", "@low=0.5"])
def test_a_moved_lora_of_a_record_keeps_its_expert_and_scale_as_typed(tmp_path: Path, after: str):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"any")
    revision = f"abc+{lora._digest(path)}"
    assert find_recorded_loras([f"gone/x.safetensors{after}"], revision, tmp_path / "v.mp4") == (
        f"{path}{after}",
    )


def test_a_packaged_lora_is_found_by_name(tmp_path, monkeypatch):
    packaged, own = tmp_path / "quick.safetensors", tmp_path / "quick"
    packaged.touch()
    monkeypatch.setattr(lora, "PACKAGED", {"quick": packaged})
    monkeypatch.chdir(tmp_path)
    assert find_lora("quick=0.5") == Lora(packaged, 0.5)
    own.touch()
    assert find_lora("quick") == Lora(Path("quick"))


@pytest.mark.parametrize("expert", ["high", "low"])
def test_a_lora_changes_only_its_expert(tmp_path: Path, expert: str):
    tensors, added = random_lora()
    save_file(tensors, tmp_path / "x.safetensors")
    pipeline = tiny_pipeline(experts=2)
    experts = {"high": pipeline.transformer, "low": pipeline.transformer_2}
    weight = "blocks.0.attn1.to_q.weight"
    before = {name: part.state_dict()[weight].clone() for name, part in experts.items()}
    merge_loras(pipeline, [find_lora(f"{tmp_path / 'x.safetensors'}@{expert}=0.5")])
    for name, part in experts.items():
        expected = before[name] + (0.5 * added[weight] if name == expert else 0)
        assert torch.allclose(part.state_dict()[weight], expected, atol=1e-6), name


@pytest.mark.parametrize("task", [IMAGE, VACE, ANIMATE, VIDEO])
def test_a_text_to_video_lora_loads_for_every_task(tmp_path: Path, task: str):
    """In image models diffusers adds zeros for the image's keys, which are not in the file."""
    generator = torch.Generator().manual_seed(0)
    layers = {f"blocks.0.cross_attn.{part}": f"blocks.0.attn2.to_{part}" for part in "qkv"}
    down, up = (torch.randn(*shape, generator=generator) for shape in ((4, 24), (24, 4)))
    tensors = {f"diffusion_model.{name}.lora_A.weight": down.clone() for name in layers}
    tensors |= {f"diffusion_model.{name}.lora_B.weight": up.clone() for name in layers}
    save_file(tensors, tmp_path / "x.safetensors")
    pipeline = tiny_pipeline(task)
    before = pipeline.transformer.state_dict()["blocks.0.attn2.to_k.weight"].clone()
    merge_loras(pipeline, [Lora(tmp_path / "x.safetensors")])
    after = pipeline.transformer.state_dict()["blocks.0.attn2.to_k.weight"]
    assert torch.allclose(after, before + up @ down, atol=1e-6)


def test_a_lora_names_an_expert_if_and_only_if_there_are_two(
    wancli: Wancli, tiny_model: Path, tmp_path: Path
):
    tiny_folder(tmp_path / "two", experts=2)
    tensors, _ = random_lora()
    save_file(tensors, "x.safetensors")
    run = ("generate", "a red circle", "--steps", 1, "--frames", 5, "--size", "32x32", "-q")
    result = wancli(*run, "--model", tmp_path / "two", "--lora", "x.safetensors")
    assert result.code == 2
    assert "which of" in result.err
    assert "x.safetensors@high" in result.err
    assert wancli(*run, "--model", tiny_model, "--lora", "x.safetensors@low").code == 2
    both = ("--lora", "x.safetensors@high=0.5", "--lora", "x.safetensors@low")
    result = wancli(*run, "--model", tmp_path / "two", *both)
    assert result.code == 0, result.err


def test_a_lora_changes_the_video_and_its_keys_are_counted(wancli: Wancli, tiny_model: Path):
    """In the plan, in the record, and on the screen where any are dropped."""
    tensors, _ = random_lora()
    images = pair("blocks.0.cross_attn.k_img") | {"blocks.9.cross_attn.norm_k.diff": torch.ones(24)}
    text = {"lora_te_layers_0_q.lora_down.weight": torch.ones(1, 2)}
    save_file(tensors | images | text, "x.safetensors")
    run = (
        "generate", "a red circle", "--model", tiny_model, "--steps", 1, "--frames", 5,
        "--size", "32x32", "--seed", 1,
    )  # fmt: skip
    plain = json.loads(wancli(*run, "--json", "-q", "-o", "a.mp4").out)
    lora = ("--lora", "x.safetensors=0.5")
    result = wancli(*run, "--json", "-o", "b.mp4", *lora)
    assert result.code == 0, result.err
    record = json.loads(result.out)
    dropped = {"text encoder layers": 1, "image layers": 2, "blocks beyond the model's last": 1}
    use = {"name": "x.safetensors", "scale": 0.5, "keys": 8, "applied": 4, "dropped": dropped}
    assert record["lora"] == [use]
    assert record["request"]["machine"]["lora"] == ["x.safetensors=0.5"]
    assert "lora" not in plain
    assert record["output"]["framemd5"] != plain["output"]["framemd5"]
    assert "x.safetensors: 4 of 8 keys applied, 2 dropped (image layers), 1 dropped" in result.err
    plan = " ".join(wancli("plan", *run[1:], *lora).out.split())
    assert "LoRA x.safetensors, 0.5 4 of 8 keys applied 2 dropped (image layers), 1" in plan
    assert json.loads(wancli(*run, *lora, "--dry-run", "--json").out)["plan"]["lora"] == [use]
    save_file(tensors, "all.safetensors")
    again = ("--lora", "all.safetensors", "-o", "c.mp4", "--skip-existing")
    assert "keys" not in wancli(*run, *again).err
    assert wancli(*run, *again).code == 0
    save_file({name: -tensor for name, tensor in tensors.items()}, "all.safetensors")
    assert "c.mp4 exists and comes from another request" in wancli(*run, *again).err
    assert wancli("generate", "x", "--lora", "no.safetensors").code == 4


@pytest.mark.parametrize(
    ("model", "number", "why"),
    [
        ("wan2.2-ti2v-5b", 0, "blocks.0.attn1.to_q.weight [5120, 5120], not [3072, 3072]"),
        ("wan2.1-vace-1.3b", 39, "none of its 2 keys has a layer"),
        ("random:wan2.1-vace-14b", 39, ""),
        ("wan2.1-t2v-14b", 39, ""),
        ("hunyuanvideo", 39, ""),  # its layers are not known before the download
    ],
)
def test_a_lora_of_another_model_is_refused_by_the_plan(
    wancli: Wancli, model: str, number: int, why: str
):
    save_file(pair(f"blocks.{number}.self_attn.q", 5120, 5120), "x.safetensors")
    run = ("plan", "--model", model, "--lora", "x.safetensors", "--force")
    result = wancli(*run)
    assert result.code == (4 if why else 0), result.err
    assert ("2 of 2 keys" in result.out) == (not why and model != "hunyuanvideo")
    if why:
        assert f"LoRA x.safetensors is not for {model}: {why}." in result.err
        assert "it fits wan2.1-t2v-14b, wan2.2-t2v-a14b, wan2.1-i2v-14b" in result.err
    if model == "wan2.1-t2v-14b":
        Path("x.safetensors").write_bytes(Path("x.safetensors").read_bytes()[:-10])
        assert wancli(*run).code == 4
