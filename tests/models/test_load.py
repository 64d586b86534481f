from pathlib import Path

import pytest
import torch

from tests.fakes import tiny_folder
from wancli.catalog.local import find_spec, revision
from wancli.catalog.specs import SPECS
from wancli.config.settings import Machine
from wancli.errors import SetupError
from wancli.models.load import load_pipeline, pick_device, pick_dtype


def test_the_vae_stays_in_float32_and_the_rest_has_the_dtype(tiny_model: Path):
    loaded = load_pipeline(find_spec(str(tiny_model)), Machine(device="cpu", dtype="bfloat16"))
    assert loaded.pipeline.vae.dtype == torch.float32
    assert loaded.pipeline.text_encoder.dtype == torch.bfloat16
    transformer = loaded.pipeline.transformer
    assert transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert transformer.blocks[0].scale_shift_table.dtype == torch.float32  # diffusers keeps it so


def test_auto_is_float32_on_a_cpu_and_bfloat16_on_a_gpu():
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert pick_dtype("float16", torch.device("cuda")) == torch.float16


def test_a_device_that_is_not_there_is_refused():
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(SetupError, match="--device cuda:99"):
        pick_device("cuda:99")


def test_the_facts_of_a_folder_are_read_from_it(tmp_path: Path):
    spec = find_spec(str(tiny_folder(tmp_path, experts=2)))
    assert (spec.experts, spec.latent_channels, spec.text_length) == (2, 4, 16)
    assert (spec.strides.temporal, spec.strides.spatial, spec.strides.patch) == (4, 8, 2)


def test_the_demo_folder_says_what_its_spec_says():
    demo = SPECS["demo"]
    assert demo.folder is not None
    read = find_spec(str(demo.folder))
    assert (read.strides, read.latent_channels) == (demo.strides, demo.latent_channels)
    assert (read.text_length, read.experts) == (demo.text_length, demo.experts)


def test_other_weights_are_another_revision(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    spec = find_spec(str(tiny_folder(tmp_path)))
    before = revision(spec)
    assert revision(spec) == before
    (weights,) = (tmp_path / "transformer").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["proj_out.bias"] += 1
    save_file(tensors, weights)
    assert revision(spec) != before
