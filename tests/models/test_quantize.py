"""Weights quantized to 8 bits: their error and their size."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import wancli
from tests.caching.tiny import DBCACHE, STEPS, denoise, draw, wan
from tests.cost.test_totals import TINY, cost_of
from tests.fakes import tiny_folder, tiny_transformer
from tests.models.test_lora import random_lora
from wancli.caching.prompt_kv import PromptKVCache, prompt_kv
from wancli.caching.step_cache import step_cache
from wancli.catalog.local import find_spec
from wancli.catalog.specs import SPECS
from wancli.catalog.tasks import ANIMATE, IMAGE, TEXT, VACE
from wancli.catalog.wan import Architecture
from wancli.config.settings import Machine
from wancli.cost.wan_transformer import quantized_bytes
from wancli.models.load import load_pipeline
from wancli.models.optimize import compile_blocks, fuse_qkv, quantize

pytest.importorskip("torchao", reason="pip install torchao")
from torchao.quantization import quant_api

KINDS = ("int8", "fp8")
every_kind = pytest.mark.parametrize("kind", KINDS)


def nbytes(transformer: Any) -> int:
    """Bytes of all parameters."""
    return sum(part.numel() * part.element_size() for part in parts(transformer))


@torch.no_grad()
def forward(transformer: Any) -> Tensor:
    """Output of one forward in bfloat16."""
    inputs = {
        "hidden_states": draw(1, 4, 2, 4, 4),
        "encoder_hidden_states": draw(1, 512, 16, seed=1),
    }
    narrow = {name: tensor.bfloat16() for name, tensor in inputs.items()}
    output: Tensor = transformer(**narrow, timestep=torch.tensor([500.0]), return_dict=False)[0]
    return output.float()


def parts(transformer: Any) -> list[Tensor]:
    """All parameters as plain tensors: an 8-bit weight is its values and its scales."""
    tensors: list[Tensor] = []
    for weight in transformer.parameters():
        eight = type(weight.data) is not Tensor
        tensors += [weight.qdata, weight.scale] if eight else [weight]
    return tensors


@pytest.fixture
def _any_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchao multiply in fp8 on a CPU, which it refuses although torch can, slowly."""
    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda _: None)


def even(task: str = TEXT, **more: Any) -> Any:
    """A tiny transformer in bfloat16 whose blocks' sizes are multiples of 16."""
    sizes = {"attention_head_dim": 16, "ffn_dim": 64, **more}
    if task in (IMAGE, ANIMATE):
        sizes["added_kv_proj_dim"] = 32
    return tiny_transformer(task=task, **sizes).to(torch.bfloat16)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize(
    ("task", "kind", "dtype"),
    [
        (TEXT, "int8", torch.float32),
        (IMAGE, "fp8", torch.bfloat16),
        (VACE, "int8", torch.bfloat16),
        (ANIMATE, "fp8", torch.float32),
    ],
)
def test_quantization_saves_the_planned_bytes(task: str, kind: str, dtype: torch.dtype):
    model = tiny_transformer(task=task).to(dtype)
    shape = replace(TINY, added_kv=task in (IMAGE, ANIMATE), vace_blocks=int(task == VACE))
    block, all_blocks = quantized_bytes(shape, element_bytes=dtype.itemsize)
    before, before_block = nbytes(model), nbytes(model.blocks[0])
    quantize(model, kind)
    assert before - nbytes(model) == all_blocks
    assert before_block - nbytes(model.blocks[0]) == block


@pytest.mark.usefixtures("_any_hardware")
@pytest.mark.parametrize("task", [TEXT, IMAGE, VACE])
def test_fp8_products_save_the_planned_bytes_and_leave_the_prompt_wide(task: str):
    model = even(task)
    shape = replace(
        TINY, head_dim=16, ffn=64, added_kv=task == IMAGE, vace_blocks=int(task == VACE)
    )
    planned = quantized_bytes(shape, element_bytes=2, dynamic=True)
    before, before_block = nbytes(model), nbytes(model.blocks[0])
    quantize(model, "fp8-dynamic")
    assert (before_block - nbytes(model.blocks[0]), before - nbytes(model)) == planned
    narrow = {n for n, p in model.named_parameters() if type(p.data) is not Tensor}
    layers = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q",
              "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2")  # fmt: skip
    blocks = ["blocks.0", "blocks.1", *(["vace_blocks.0"] if task == VACE else [])]
    assert narrow == {f"{block}.{layer}.weight" for block in blocks for layer in layers}


@pytest.mark.usefixtures("_any_hardware")
def test_fp8_products_leave_layers_of_uneven_sizes_wide():
    model = even(ffn_dim=40)
    quantize(model, "fp8-dynamic")
    block = model.blocks[0]
    assert type(block.ffn.net[2].weight.data) is Tensor
    assert type(block.attn1.to_q.weight.data) is not Tensor


def test_the_sizes_of_known_models_are_those_that_fp8_products_take():
    for shapes in (spec.architecture for spec in SPECS.values()):
        if isinstance(shapes, Architecture):
            assert shapes.transformer.dim % 16 == shapes.transformer.ffn % 16 == 0


@pytest.mark.usefixtures("_any_hardware")
def test_fp8_products_are_as_close_as_eight_bits_allow_with_fused_projections_too():
    model, small, fused = even(), even(), even()
    fuse_qkv(fused)
    for one in (small, fused):
        quantize(one, "fp8-dynamic")
    whole = forward(model)
    assert 1e-3 < relative(forward(small), whole) < 0.06  # e4m3 rounds by up to 1/16
    assert relative(forward(fused), forward(small)) < 0.01
    assert type(fused.blocks[0].attn2.to_kv.weight.data) is Tensor


@pytest.mark.slow
@pytest.mark.usefixtures("_any_hardware")
@pytest.mark.filterwarnings("ignore:.*_stable_hash_for_caching")
def test_fp8_products_are_compiled_into_whole_graphs():
    model, small = even(), even()
    quantize(small, "fp8-dynamic")
    compile_blocks(small, "default")
    assert relative(forward(small), forward(model)) < 0.06


@pytest.mark.gpu
@pytest.mark.parametrize("command", ["generate", "rollout"])
def test_fp8_products_are_close_to_bfloat16_on_a_gpu(command: str):
    """Latents, since decoding makes more or less of the same error; few graphs to compile."""

    def run(**machine: Any) -> Tensor:
        options: dict[str, Any] = {"seed": 1, "steps": 2, "vae_exact": True, **machine}
        if command == "generate":
            clip = wancli.generate("a red circle", num_frames=5, **options)
            assert clip.latents is not None
            return clip.latents.float().cpu()
        (chunk,) = wancli.rollout("a red circle", chunks=1, **options)
        return chunk.latents.float().cpu()

    whole, small = run(), run(quantize="fp8-dynamic", compile=True)
    # On a CPU: 0.11, of a forward 0.04; bfloat16 alone is 0.03 from float32.
    assert 0.05 < relative(small, whole) < 0.25


@pytest.mark.parametrize(("kind", "dtype"), [("int8", "float32"), ("fp8", "bfloat16")])
def test_a_loaded_model_has_the_planned_size(kind: Any, dtype: Any):
    machine = Machine(device="cpu", dtype=dtype, quantize=kind)
    planned = cost_of("demo", wide=dtype == "float32", machine={"quantize": kind})
    transformer = load_pipeline(find_spec("demo"), machine).pipeline.transformer
    assert planned.weights["transformer"] == nbytes(transformer)
    whole = cost_of("demo", wide=dtype == "float32")
    assert planned.resident_weights["group"]["denoise"] < whole.resident_weights["group"]["denoise"]


@every_kind
def test_quantization_error_is_at_most_half_a_step_of_the_row(kind: str):
    plain, model = wan(), wan()
    quantize(model, kind)
    for name, layer in plain.blocks.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        weight = model.blocks.get_submodule(name).weight
        most = layer.weight.abs().amax(1, keepdim=True)
        # int8 has 127 even steps; e4m3 has 3 mantissa bits, so half a step is 1/16 of the value.
        half = most / 127 / 2 if kind == "int8" else layer.weight.abs() / 16 + most / 448 / 512
        error = (weight.dequantize() - layer.weight).abs()
        assert (error <= half * 1.001).all(), name
        assert error.max() > 0, name


@every_kind
def test_weights_outside_the_blocks_are_unchanged(kind: str):
    plain, model = wan(), wan()
    quantize(model, kind)
    narrow = {n for n, p in model.named_parameters() if type(p.data) is not Tensor}
    assert len(narrow) == 10 * len(model.blocks)
    assert all(name.startswith("blocks.") and name.endswith(".weight") for name in narrow)
    for name, old in plain.named_parameters():
        assert name in narrow or torch.equal(old, model.get_parameter(name))


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.005), ("fp8", 0.03)])
def test_latents_are_close_to_unquantized_ones(kind: str, most: float):
    model = wan()
    whole = denoise(model)
    quantize(model, kind)
    error = relative(denoise(model), whole)
    assert 0 < error < most, f"relative error of the latents {error:.2e}"


@every_kind
def test_prompt_kv_is_exact_with_quantized_weights(kind: str):
    model = wan()
    quantize(model, kind)
    plain = denoise(model)
    with prompt_kv(model, PromptKVCache()):
        assert torch.equal(denoise(model), plain)


def test_a_step_cache_reuses_the_same_steps_as_unquantized():
    reused = []
    for number in range(2):
        model = wan()
        if number:
            quantize(model, "int8")
        with step_cache(model, DBCACHE, steps=STEPS, guided=True) as session:
            denoise(model)
        reused.append([use.reused for use in session.stats()])
    assert reused[0] == reused[1]
    assert any(reused[0])


@every_kind
def test_fused_projections_quantize_to_the_same_values(kind: str):
    model, fused = wan(), wan()
    fuse_qkv(fused)
    for one in (model, fused):
        quantize(one, kind)
    assert relative(denoise(fused), denoise(model)) < 1e-6
    assert nbytes(fused) == nbytes(model)


def test_a_lora_is_merged_before_quantization(tmp_path: Path):
    tensors, added = random_lora()
    save_file(tensors, tmp_path / "x.safetensors")
    spec = find_spec(str(tiny_folder(tmp_path / "model")))
    machine = Machine(device="cpu", quantize="int8", lora=(f"{tmp_path / 'x.safetensors'}=0.5",))
    loaded = load_pipeline(spec, machine).pipeline.transformer
    expected = load_pipeline(spec, Machine(device="cpu")).pipeline.transformer
    for name, product in added.items():
        expected.get_parameter(name).data += 0.5 * product
    quantize(expected, "int8")
    for ours, theirs in zip(parts(loaded), parts(expected), strict=True):
        assert torch.allclose(ours.float(), theirs.float(), rtol=2**-3, atol=1.0)
    for name in added:
        ours, theirs = (m.get_parameter(name).dequantize() for m in (loaded, expected))
        assert relative(ours, theirs) < 1e-2


@every_kind
def test_quantizing_leaves_the_options_of_torch_compile_unchanged(kind: str):
    from torch._inductor import config

    before = config.save_config_portable()
    quantize(wan(), kind)
    assert config.save_config_portable() == before


def test_the_next_model_is_not_quantized(tiny_model: Path):
    spec = find_spec(str(tiny_model))
    small, whole = (
        load_pipeline(spec, machine).pipeline.transformer
        for machine in (Machine(device="cpu", quantize="int8"), Machine(device="cpu"))
    )
    assert nbytes(small) < nbytes(whole)
    assert all(type(p.data) is Tensor for p in whole.parameters())
