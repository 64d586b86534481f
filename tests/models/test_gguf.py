"""Quantized weights of GGUF files: kept as stored, used as their dequantized values."""

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from tests.caching.tiny import draw
from tests.conftest import Wancli
from tests.fakes import tiny_folder
from tests.models.test_convert import Tensors
from tests.models.test_single_file import RUN, original_names, weights_of
from wancli.caching.prompt_attention import WeightOffloader
from wancli.catalog.local import find_spec
from wancli.catalog.part_names import text_encoder_name
from wancli.catalog.specs import ModelSpec
from wancli.catalog.weight_files import GGUF_TYPES, add_weight_files
from wancli.config.resolve import Layer, resolve
from wancli.config.settings import Machine, Settings
from wancli.cost.totals import Cost, generation_cost
from wancli.errors import ModelError, PlanError, SetupError, WancliError
from wancli.models.load import load_pipeline, load_vae
from wancli.models.lora import merge_loras
from wancli.models.offload import place
from wancli.models.optimize import compile_blocks
from wancli.models.warm import WarmPipeline
from wancli.planning.lora import find_lora
from wancli.planning.plan import make_plan
from wancli.utils.gguf import LAYOUTS, QUANTIZED

gguf = pytest.importorskip("gguf", reason="pip install gguf")
quantizers = pytest.importorskip("diffusers.quantizers.gguf.utils")
GGUFLinear = quantizers.GGUFLinear
CPU = torch.device("cpu")
QUERY = "blocks.0.self_attn.q.weight"
# Where a block has its scales, in half precision, for types that the package does not write.
SCALES = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with rows of whole blocks: of 32 weights, and in `ffn.2` of 256."""
    path = tmp_path_factory.mktemp("even") / "model"
    tiny_folder(path, attention_head_dim=16, ffn_dim=256, text_dim=32)
    shapes = UMT5Config(vocab_size=32, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        UMT5EncoderModel(shapes).eval().save_pretrained(path / "text_encoder")
    return path


def stored(values: Tensor, kind: str) -> Any:
    """The bytes of a matrix in a type of ggml; for some, random ones that are valid."""
    if kind not in SCALES:
        return gguf.quants.quantize(values.float().numpy(), gguf.GGMLQuantizationType[kind])
    layout, generator = LAYOUTS[kind], np.random.default_rng(values.numel())
    rows, columns = values.shape[0], values.shape[1] // layout.weights
    blocks = generator.integers(0, 256, (rows, columns, layout.bytes), "u1")
    for at in SCALES[kind]:
        blocks[..., at : at + 2] = np.frombuffer(np.float16(1e-4).tobytes(), "u1")
    return blocks.reshape(rows, -1)


def weights_of_block(kind: str) -> int:
    return LAYOUTS[kind].weights


BY_BLOCK = sorted(GGUF_TYPES, key=weights_of_block)


def write(
    path: Path, tensors: Tensors, *kinds: str, architecture: str = "wan", only: str = ""
) -> Path:
    """Write matrices of whole blocks, those of names that begin so, in types; others in F32.

    Of the types with the largest blocks that fit, each in turn.
    """
    writer = gguf.GGUFWriter(path, architecture)
    by_block = itertools.groupby(sorted(kinds or ("Q8_0",), key=weights_of_block), weights_of_block)
    turns = {weights: itertools.cycle([*same]) for weights, same in by_block}
    for name, tensor in tensors.items():
        fits = [weights for weights in turns if tensor.shape[-1] % weights == 0]
        if fits and tensor.ndim == 2 and name.startswith(only) and "rel_b" not in name:
            chosen = next(turns[max(fits)])
            data = stored(tensor, chosen)
        else:
            data, chosen = tensor.float().numpy(), "F32"
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[chosen])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def transformer_file(folder: Path, path: Path, *kinds: str, only: str = "") -> Path:
    return write(path, original_names(weights_of(folder, "transformer")), *kinds, only=only)


def spec_with(folder: Path, path: Path) -> ModelSpec:
    return add_weight_files(find_spec(str(folder)), [str(path)])


def load(spec: ModelSpec, dtype: str = "float32", **more: Any) -> Any:
    machine = Machine.model_validate({"device": "cpu", "dtype": dtype, "vae_dtype": dtype, **more})
    return load_pipeline(spec, machine).pipeline


def cost(spec: ModelSpec, *, wide: bool = True, **machine: Any) -> Cost:
    settings = resolve([Layer("flag", {"machine": machine})], Settings).settings
    planned = generation_cost(settings, spec, make_plan(settings, spec), wide=wide)
    assert planned
    return planned


def nbytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def dequantized(model: nn.Module, dtype: torch.dtype) -> Tensors:
    """The values of all parameters, of quantized ones by the gguf package, from float32."""
    values = {}
    for name, parameter in model.named_parameters():
        values[name] = parameter.detach().clone()
        if hasattr(parameter, "quant_type"):
            rows = parameter.detach().numpy().view("u1")
            wide = gguf.quants.dequantize(rows, parameter.quant_type)
            values[name] = torch.from_numpy(wide).to(dtype)
    return values


def half_values(model: nn.Module) -> Tensors:
    """The values of all parameters, of quantized ones as diffusers dequantizes them."""
    return {
        name: quantizers.dequantize_gguf_tensor(parameter)
        for name, parameter in model.named_parameters()
    }


@pytest.mark.parametrize(
    ("kinds", "dtype"),
    [
        (("F32", "F16", "BF16"), "float32"),
        *((BY_BLOCK[first::3], "float32") for first in range(3)),
        (("Q8_0", "Q6_K"), "bfloat16"),
    ],
)
def test_a_model_computes_as_one_of_the_dequantized_weights_at_the_planned_size(
    kinds: Sequence[str], dtype: str, folder: Path, tmp_path: Path
):
    """diffusers dequantizes in half precision: each value is rounded by up to a few 2**-11."""
    spec = spec_with(folder, transformer_file(folder, tmp_path / "x.gguf", *kinds))
    model, plain = load(spec, dtype).transformer, load(find_spec(str(folder)), dtype).transformer
    at = getattr(torch, dtype)
    exact = dequantized(model, at)
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "quant_type"):
            values = quantizers.dequantize_gguf_tensor(parameter).to(at)
            error = (values - exact[name]).abs().max() / exact[name].abs().max()
            assert error <= (2**-9 if at == torch.float32 else 2**-7), name
            exact[name] = values
    plain.load_state_dict(exact, assign=True)
    narrow = [module.weight for module in model.modules() if isinstance(module, GGUFLinear)]
    assert {weight.quant_type.name for weight in narrow} == QUANTIZED & {*kinds}
    assert torch.equal(run(model, at), run(plain, at))
    planned = cost(spec, wide=dtype == "float32")
    assert planned.weights["transformer"] == nbytes(model)


@torch.no_grad()
def run(transformer: Any, dtype: torch.dtype) -> Tensor:
    inputs = {
        "hidden_states": draw(1, 4, 2, 4, 4).to(dtype),
        "encoder_hidden_states": draw(1, 16, 32, seed=1).to(dtype),
    }
    output: Tensor = transformer(**inputs, timestep=torch.tensor([500.0]), return_dict=False)[0]
    return output.float()


def test_weights_that_stay_quantized_are_those_of_linear_layers_outside_float32_modules(
    folder: Path, tmp_path: Path
):
    model = load(
        spec_with(folder, transformer_file(folder, tmp_path / "x.gguf", "Q4_0"))
    ).transformer
    packed = {n for n, module in model.named_modules() if isinstance(module, GGUFLinear)}
    others = {
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, GGUFLinear)
    }  # fmt: skip
    assert others == {  # the first is in float32, the second is not whole blocks
        "condition_embedder.time_embedder.linear_1", "condition_embedder.time_embedder.linear_2",
    }  # fmt: skip
    assert {"blocks.1.ffn.net.2", "condition_embedder.time_proj", "proj_out"} <= packed
    assert model.dtype == torch.float32


def test_group_offload_is_planned_with_the_largest_block(folder: Path, tmp_path: Path):
    path = transformer_file(folder, tmp_path / "x.gguf", only="blocks.0.")
    spec = spec_with(folder, path)
    model, planned = load(spec).transformer, cost(spec)
    small, large = map(nbytes, model.blocks)
    assert small < large / 3
    resident = nbytes(model) - small + planned.weights["vae"]
    assert planned.resident_weights["group"]["denoise"] == resident


def test_offloading_and_freed_weights_keep_the_types(folder: Path, tmp_path: Path):
    spec = spec_with(folder, transformer_file(folder, tmp_path / "x.gguf"))
    expected = run(load(spec).transformer, torch.float32)
    for mode in ("model", "group"):
        pipeline = load(spec)
        place(pipeline, CPU, mode)
        assert torch.equal(run(pipeline.transformer, torch.float32), expected)
    model, offloader = load(spec).transformer, WeightOffloader(CPU)
    offloader.offload([block.attn2.to_k for block in model.blocks])
    offloader.restore()
    assert torch.equal(run(model, torch.float32), expected)


def lora_file(path: Path, layers: Sequence[str], seed: int, **more: Tensor) -> Path:
    """A LoRA of rank 4 for matrices [32, 32], with alpha 2."""
    tensors = dict(more)
    for index, layer in enumerate(layers):
        name = f"diffusion_model.{layer}"
        tensors[f"{name}.lora_down.weight"] = draw(4, 32, seed=seed + index)
        tensors[f"{name}.lora_up.weight"] = draw(32, 4, seed=seed + index + 50) / 10
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)
    return path


def test_loras_are_added_beside_quantized_weights_at_the_planned_size(folder: Path, tmp_path: Path):
    """Two LoRAs: together as on the dequantized weights, in either order; elsewhere merged."""
    names = ("blocks.0.self_attn.q", "blocks.1.cross_attn.k", "blocks.1.self_attn.o")
    bias = {"diffusion_model.blocks.0.self_attn.q.diff_b": draw(32, seed=9)}
    files = [
        f"{lora_file(tmp_path / 'a.safetensors', names, 0, **bias)}=0.5",
        str(lora_file(tmp_path / "b.safetensors", names[1:], 7)),
    ]
    spec = spec_with(
        folder, transformer_file(folder, tmp_path / "x.gguf", only="blocks.1.self_attn.")
    )
    without = load(spec).transformer
    pipelines = [load(spec, lora=order) for order in (files, files[::-1])]
    ours, other = (pipeline.transformer for pipeline in pipelines)
    plain = load(find_spec(str(folder)))
    plain.transformer.load_state_dict(
        {name: values.float() for name, values in half_values(without).items()}, assign=True
    )
    merge_loras(plain, [find_lora(text) for text in files])
    result = run(ours, torch.float32)
    assert torch.equal(result, run(other, torch.float32))
    assert torch.allclose(result, run(plain.transformer, torch.float32), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(result, run(without, torch.float32), atol=1e-2)
    planned = cost(spec, lora=tuple(files))
    assert planned.weights["transformer"] == nbytes(ours) == nbytes(without) + 4 * 2 * 2 * 4 * 32
    smallest = min(map(nbytes, ours.blocks))
    resident = nbytes(ours) - smallest + planned.weights["vae"]
    assert planned.resident_weights["group"]["denoise"] == resident
    place(pipelines[1], CPU, "group")
    assert torch.equal(run(other, torch.float32), result)


def test_a_lora_that_changes_a_whole_quantized_weight_is_refused(folder: Path, tmp_path: Path):
    spec = spec_with(folder, transformer_file(folder, tmp_path / "x.gguf"))
    whole = {"diffusion_model.blocks.0.self_attn.q.diff": draw(32, 32)}
    path = lora_file(tmp_path / "a.safetensors", (), 0, **whole)
    for use in (cost, load):
        with pytest.raises(
            ModelError, match=r"changes the whole of blocks.0.attn1.to_q \(diffusion_"
        ):
            use(spec, lora=(str(path),))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*_stable_hash_for_caching")
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_compiled_blocks_dequantize_too(kind: str, folder: Path, tmp_path: Path):
    """With a LoRA beside them; compiled, values are not rounded to half precision."""
    spec = spec_with(folder, transformer_file(folder, tmp_path / "x.gguf", kind))
    lora = lora_file(tmp_path / "a.safetensors", ("blocks.0.self_attn.q",), 0)
    model = load(spec, lora=(str(lora),)).transformer
    expected = run(model, torch.float32)
    compile_blocks(model, "default")
    assert torch.allclose(run(model, torch.float32), expected, atol=1e-3, rtol=1e-3)


def llama_names(tensors: Tensors) -> Tensors:
    """A tiny UMT5 encoder in the names of llama.cpp, by the gguf package's table."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 2)
    old = {name: names.get_name(name.removesuffix(".weight")) for name in tensors}
    return {f"{old[name]}.weight": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_text_encoder_of_llama_cpp_encodes_with_the_dequantized_weights(
    dtype: str, folder: Path, tmp_path: Path
):
    tensors = weights_of(folder, "text_encoder")
    renamed = llama_names(tensors)
    assert {text_encoder_name(name) for name in renamed} == tensors.keys()
    path = write(tmp_path / "t.gguf", renamed, "Q8_0", architecture="t5encoder")
    spec = add_weight_files(find_spec(str(folder)), text_encoder=str(path))
    model, plain = (load(each, dtype).text_encoder for each in (spec, find_spec(str(folder))))
    assert isinstance(model.encoder.block[0].layer[1].DenseReluDense.wo, GGUFLinear)
    values = dequantized(model, getattr(torch, dtype))
    plain.load_state_dict(values, assign=True, strict=False)
    plain.tie_weights()
    with torch.no_grad():
        ours, theirs = (each(torch.arange(9)[None])[0].float() for each in (model, plain))
    assert (ours - theirs).norm() / theirs.norm() < (1e-3 if dtype == "float32" else 0.02)
    planned = cost(spec, wide=dtype == "float32")
    assert planned.weights["text_encoder"] == nbytes(model)


def test_a_vae_is_dequantized_as_it_loads(folder: Path, tmp_path: Path):
    path = write(tmp_path / "v.gguf", weights_of(folder, "vae"), architecture="pig")
    machine = Machine(device="cpu")
    spec = add_weight_files(find_spec(str(folder)), vae=str(path))
    ours, theirs = (load_vae(each, machine)[0] for each in (spec, find_spec(str(folder))))
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


def test_axes_of_one_that_ggml_drops_are_put_back(folder: Path, tmp_path: Path):
    tensors = original_names(weights_of(folder, "transformer"))
    flat = {n: t.squeeze(0) if "modulation" in n else t for n, t in tensors.items()}
    spec = spec_with(folder, write(tmp_path / "x.gguf", flat, "F32"))
    values = load(spec).transformer.state_dict()
    assert all(torch.equal(values[n], t) for n, t in weights_of(folder, "transformer").items())


def foreign(architecture: str, path: Path, _: Tensors) -> None:
    write(path, {"double_blocks.0.img_mlp.0.weight": torch.ones(32, 32)}, architecture=architecture)


def truncated(path: Path, tensors: Tensors) -> None:
    write(path, tensors)
    path.write_bytes(path.read_bytes()[:-100])


def lacking(path: Path, tensors: Tensors) -> None:
    write(path, {name: tensor for name, tensor in tensors.items() if name != QUERY})


def with_more(path: Path, tensors: Tensors) -> None:
    write(path, tensors | {"blocks.0.extra.weight": torch.ones(1)})


def of_an_unknown_type(path: Path, tensors: Tensors) -> None:
    write(path, tensors)
    content = path.read_bytes()
    at = content.index(QUERY.encode()) + len(QUERY) + 4 + 2 * 8
    path.write_bytes(content[:at] + b"\x18\0\0\0" + content[at + 4 :])  # I8: it fits


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(foreign, "flux"), "x.gguf holds no transformer of a Wan: it is of the kind flux."),
        (partial(foreign, "llama"), "holds no transformer of a Wan: it is of the kind llama."),
        (truncated, "GGUF that is truncated: its last tensors are missing"),
        (lacking, "keys missing: blocks.0.attn1.to_q.weight."),
        (with_more, "keys unexpected: blocks.0.extra.weight."),
        (of_an_unknown_type, f"of a dtype that is not read: {QUERY} I8."),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said_before_anything_loads(
    make: Callable[[Path, Tensors], object], words: str, folder: Path, tmp_path: Path
):
    make(tmp_path / "x.gguf", original_names(weights_of(folder, "transformer")))
    with pytest.raises(SetupError) as error:
        spec_with(folder, tmp_path / "x.gguf")
    assert words in str(error.value)
    assert error.value.exit_code == 4


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"quantize": "int8"}, "`quantize int8` changes weights, and those of x.gguf stay"),
        ({"fuse_qkv": True}, "`fuse_qkv` changes weights"),
        ({"offload": "sequential", "device": "cuda"}, "`offload sequential` takes weights apart"),
    ],
)
def test_settings_that_need_plain_weights_are_refused(
    tables: dict[str, Any], words: str, folder: Path, tmp_path: Path
):
    machine = Machine.model_validate(tables)
    spec = spec_with(folder, transformer_file(folder, tmp_path / "x.gguf"))
    with pytest.raises(PlanError, match=words):
        make_plan(Settings(machine=machine), spec)
    plain = spec_with(folder, transformer_file(folder, tmp_path / "y.gguf", "F16"))
    make_plan(Settings(machine=machine), plain)


def test_a_missing_package_says_what_to_install(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spec = spec_with(folder, transformer_file(folder, tmp_path / "x.gguf"))
    plain = spec_with(folder, transformer_file(folder, tmp_path / "y.gguf", "BF16"))
    monkeypatch.setattr("wancli.utils.packages.package_version", lambda _: "")
    WarmPipeline(plain, Machine())
    cost(spec)  # for which nothing is installed
    for use in (WarmPipeline, load_vae):
        with pytest.raises(WancliError) as caught:
            use(spec, Machine())
        assert caught.value.hint == "pip install 'gguf>=0.18'"
        assert caught.value.exit_code == 4


def test_a_video_is_made_from_a_file_described_and_reproduced(
    wancli: Wancli, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    transformer_file(folder, Path("wan-i2v-high.gguf"))
    shutil.copytree(folder, "bare")
    run = (*RUN, "--model", "bare", "--transformer", "wan-i2v-high.gguf", "--dtype", "float32")
    result = wancli(*run, "--json", "-o", "a.mp4")
    assert result.code == 0, result.err
    (weights,) = json.loads(result.out)["request"]["weights"]
    assert weights["dtypes"] == ["F32", "Q8_0"]
    assert "identical" in wancli("repro", "a.mp4", "-o", "b.mp4").err
    plan = " ".join(wancli("plan", *run[1:]).out.split())
    kept = sum(each.bytes for each in spec_with(folder, Path("wan-i2v-high.gguf")).files[0].packed)
    assert f"in float32, Q8_0 {kept:,} bytes stay quantized" in plan
    facts = json.loads(wancli("model", "info", "wan-i2v-high.gguf", "--json").out)
    assert (facts["kind"], facts["part"], facts["task"]) == ("wan", "transformer", "image-to-video")
    assert (facts["blocks"], facts["dim"], facts["expert"]) == (2, 32, "high")
    assert facts["dtypes"].keys() == {"float32", "Q8_0"}
    assert "high noise, by its name" in wancli("model", "info", "wan-i2v-high.gguf").out
    Path("weights/unet").mkdir(parents=True)
    shutil.move("wan-i2v-high.gguf", "weights/unet/named.gguf")
    result = wancli("model", "info", "wan-i2v-high.gguf")
    assert (result.code, "wan-i2v-high.gguf" in result.err) == (4, True)
    assert wancli("repro", "a.mp4", "-o", "c.mp4").code == 4
    monkeypatch.setenv("WANCLI_MODEL_PATH", "weights")
    assert json.loads(wancli("model", "info", "named.gguf", "--json").out) == {
        **facts, "path": "weights/unet/named.gguf", "expert": "", "task": "",
    }  # fmt: skip
