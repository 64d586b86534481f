"""LoRAs are merged as W + scale * B @ A, or rejected."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.conftest import Wancli
from tests.fakes import tiny_folder, tiny_pipeline
from wancli.catalog.tasks import ANIMATE, IMAGE, VACE, VIDEO
from wancli.errors import InputError, ModelError, SettingsError
from wancli.models.lora import merge_loras
from wancli.planning import lora
from wancli.planning.lora import Lora, find_lora

LAYERS = {
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
    "blocks.1.ffn.0": "blocks.1.ffn.net.0.proj",
}


def random_lora(naming: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A random LoRA's tensors by name, and the product that each pair adds to its layer."""
    generator, tensors, added = torch.Generator().manual_seed(0), {}, {}
    for original, layer in LAYERS.items():
        rows = 32 if "ffn" in layer else 24
        down = torch.randn(4, 24, generator=generator)
        up = torch.randn(rows, 4, generator=generator)
        name = {"wan": f"diffusion_model.{original}", "diffusers": f"transformer.{layer}",
                "longlive": f"base_model.model.model.{original}"}[naming]  # fmt: skip
        middle = ".default" if naming == "longlive" else ""
        tensors[f"{name}.lora_A{middle}.weight"] = down
        tensors[f"{name}.lora_B{middle}.weight"] = up
        added[f"{layer}.weight"] = up @ down
    return tensors, added


@pytest.mark.parametrize("naming", ["wan", "diffusers", "longlive"])
def test_a_lora_changes_the_weights_of_its_layers_only(tmp_path: Path, naming: str):
    tensors, added = random_lora(naming)
    path = tmp_path / ("x.pt" if naming == "longlive" else "x.safetensors")
    if naming == "longlive":
        torch.save({"generator_lora": tensors, "step": torch.tensor(3)}, path)
    else:
        save_file(tensors, path)
    pipeline = tiny_pipeline()
    before = {name: p.clone() for name, p in pipeline.transformer.state_dict().items()}
    merge_loras(pipeline, [Lora(path, 0.5)])
    after = pipeline.transformer.state_dict()
    assert set(after) == set(before)
    for name, old in before.items():
        expected = old + 0.5 * added[name] if name in added else old
        assert torch.allclose(after[name], expected, atol=1e-6), name


def test_two_loras_add_up(tmp_path: Path):
    tensors, added = random_lora("wan")
    save_file(tensors, tmp_path / "x.safetensors")
    pipeline = tiny_pipeline()
    weight = "blocks.0.attn1.to_q.weight"
    before = pipeline.transformer.state_dict()[weight].clone()
    merge_loras(pipeline, [Lora(tmp_path / "x.safetensors", scale) for scale in (1.0, -0.25)])
    after = pipeline.transformer.state_dict()[weight]
    assert torch.allclose(after, before + 0.75 * added[weight], atol=1e-6)


def test_a_pair_without_a_layer_is_an_error(tmp_path: Path):
    tensors, _ = random_lora("wan")
    tensors = {name.replace("blocks.1", "blocks.9"): value for name, value in tensors.items()}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="LoRA"):
        merge_loras(tiny_pipeline(), [Lora(tmp_path / "x.safetensors")])


def test_a_file_without_a_lora_is_rejected(tmp_path: Path):
    (tmp_path / "x.pt").write_bytes(b"abc")
    save_file({"a": torch.zeros(1)}, tmp_path / "y.safetensors")
    for name, error in (("x.pt", InputError), ("y.safetensors", ModelError)):
        with pytest.raises(error, match=name):
            merge_loras(tiny_pipeline(), [Lora(tmp_path / name)])


def test_an_alpha_scales_its_pair(tmp_path: Path):
    tensors, added = random_lora("wan")
    old = {
        n.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): t for n, t in tensors.items()
    }
    alphas = {f"diffusion_model.{layer}.alpha": torch.tensor(1.0) for layer in LAYERS}
    save_file(old | alphas, tmp_path / "x.safetensors")
    pipeline = tiny_pipeline()
    weight = "blocks.1.ffn.net.0.proj.weight"
    before = pipeline.transformer.state_dict()[weight].clone()
    merge_loras(pipeline, [Lora(tmp_path / "x.safetensors")])
    after = pipeline.transformer.state_dict()[weight]
    assert torch.allclose(after, before + added[weight] / 4, atol=1e-6)


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
    tensors, added = random_lora("wan")
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
    tensors, _ = random_lora("wan")
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


def test_a_lora_changes_the_video_and_is_recorded(wancli: Wancli, tiny_model: Path):
    tensors, _ = random_lora("wan")
    save_file(tensors, "x.safetensors")
    run = (
        "generate", "a red circle", "--model", tiny_model, "--steps", 1, "--frames", 5,
        "--size", "32x32", "--seed", 1, "--json", "-q",
    )  # fmt: skip
    import json

    plain = json.loads(wancli(*run, "-o", "a.mp4").out)
    result = wancli(*run, "-o", "b.mp4", "--lora", "x.safetensors=0.5")
    assert result.code == 0, result.err
    record = json.loads(result.out)
    assert record["request"]["machine"]["lora"] == ["x.safetensors=0.5"]
    assert plain["request"]["machine"]["lora"] == []
    assert record["output"]["framemd5"] != plain["output"]["framemd5"]
    assert wancli("generate", "x", "--lora", "no.safetensors").code == 4
