import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers

from tests.fakes import tiny_folder
from wancli.catalog.local import PARTS, find_spec, revision
from wancli.catalog.specs import SPECS
from wancli.catalog.tasks import IMAGE
from wancli.config.precision import decoder_dtype, decodes_fast, transformer_dtype
from wancli.config.settings import Machine
from wancli.errors import ModelError, SetupError
from wancli.models.fast_decoder import decoder_in_words, latents_per_call
from wancli.models.load import load_pipeline, load_vae, pick_device
from wancli.models.warm import LoadWatch
from wancli.records.progress import Loading


def test_dtype_applies_to_all_components_but_the_vae(tiny_model: Path):
    loaded = load_pipeline(find_spec(str(tiny_model)), Machine(device="cpu", dtype="bfloat16"))
    assert loaded.pipeline.vae.dtype == torch.float32
    assert loaded.pipeline.text_encoder.dtype == torch.bfloat16
    transformer = loaded.pipeline.transformer
    assert transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert transformer.blocks[0].scale_shift_table.dtype == torch.float32  # diffusers keeps it so


@pytest.mark.parametrize("parts", [PARTS, ("transformer",)])
def test_parts_are_reported_before_they_are_read(tiny_model: Path, parts: tuple[str, ...]):
    events: list[Any] = []
    watch = LoadWatch(report=events.append)
    load_pipeline(find_spec(str(tiny_model)), Machine(device="cpu"), parts, watch=watch)
    order = [part for part in ("vae", "transformer", "text_encoder") if part in parts]
    sizes = [
        sum(file.stat().st_size for file in (tiny_model / part).glob("*.safetensors"))
        for part in order
    ]
    done = [0, *accumulate(sizes)][:-1]
    assert events == [Loading(*each, sum(sizes)) for each in zip(order, done, strict=True)]


def test_auto_is_float32_on_a_cpu_and_bfloat16_on_a_gpu():
    assert transformer_dtype(Machine(), "cpu") == "float32"
    assert transformer_dtype(Machine(), "cuda") == "bfloat16"
    assert transformer_dtype(Machine(dtype="float16"), "cuda") == "float16"


def test_a_missing_device_is_rejected():
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(SetupError, match="`device cuda:99`"):
        pick_device("cuda:99")


def test_a_spec_is_read_from_its_folder(tmp_path: Path):
    spec = find_spec(str(tiny_folder(tmp_path, experts=2)))
    assert (spec.experts, spec.latent_channels, spec.text_length) == (2, 4, 16)
    assert (spec.strides.temporal, spec.strides.spatial, spec.strides.patch) == (4, 8, 2)


def test_the_demo_folder_matches_its_spec():
    demo = SPECS["demo"]
    assert demo.folder is not None
    read = find_spec(str(demo.folder))
    assert (read.strides, read.latent_channels) == (demo.strides, demo.latent_channels)
    assert (read.text_length, read.experts) == (demo.text_length, demo.experts)


def test_changed_weights_change_the_revision(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    spec = find_spec(str(tiny_folder(tmp_path)))
    before = revision(spec)
    assert revision(spec) == before
    (weights,) = (tmp_path / "transformer").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["proj_out.bias"] += 1
    save_file(tensors, weights)
    assert revision(spec) != before


@pytest.mark.parametrize("change", [{"crop_size": 8}, {"image_mean": [0.5]}, {"resample": None}])
def test_an_image_processor_that_does_not_fit_its_encoder_is_rejected(
    tmp_path: Path, change: dict[str, Any]
):
    path = tiny_folder(tmp_path, IMAGE) / "image_processor/preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match="cannot load model"):
        load_pipeline(find_spec(str(tmp_path)), Machine(), task=IMAGE)


def test_loading_restores_the_verbosity_of_the_libraries(tiny_model: Path):
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [(each.get_verbosity(), each.is_progress_bar_enabled()) for each in libraries]
    load_vae(find_spec(str(tiny_model)), Machine(device="cpu"))
    assert [(each.get_verbosity(), each.is_progress_bar_enabled()) for each in libraries] == before


@pytest.mark.parametrize(
    ("kind", "machine", "fast", "dtype"),
    [
        ("cpu", {}, False, "float32"),
        ("cpu", {"vae_exact": False}, True, "float32"),
        ("cuda", {}, True, "bfloat16"),
        ("cuda", {"vae_exact": True}, False, "float32"),
        ("cuda", {"vae_dtype": "float32"}, True, "float32"),
        ("cuda", {"vae_dtype": "float16", "vae_exact": True}, False, "float16"),
        ("mps", {}, False, "float32"),
    ],
)
def test_a_gpu_decodes_fast_and_in_bfloat16_by_default(
    kind: str, machine: dict[str, Any], fast: bool, dtype: str
):
    settings = Machine(**machine)
    assert decodes_fast(settings, kind) is fast
    assert decoder_dtype(settings, kind) == dtype


def test_a_vae_is_loaded_with_the_decoder_that_is_set(tiny_model: Path):
    spec = find_spec(str(tiny_model))
    exact, fast = (load_vae(spec, Machine(device="cpu", vae_exact=way))[0] for way in (None, False))
    assert (decoder_in_words(exact), decoder_in_words(fast)) == ("exact float32", "fast float32")
    assert (latents_per_call(exact), latents_per_call(fast)) == (1, 3)
