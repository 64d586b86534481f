"""The closed forms are exactly what diffusers' and transformers' own classes have and do."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from tests.fakes import tiny_transformer
from tests.shapes import flops, inputs, moved, parameters, peak_bytes, transformer
from wancli.caching.prompt_kv import PromptKVCache, prompt_kv
from wancli.catalog import wan as architectures
from wancli.catalog.geometry import Span, WindowConfig
from wancli.catalog.hf_configs import image_encoder_config, text_encoder_config
from wancli.catalog.hunyuan import HunyuanVideo
from wancli.catalog.local import spec_of_folder
from wancli.catalog.specs import DEMO_FOLDER, SPECS
from wancli.catalog.wan import Architecture, ImageEncoder, TextEncoder, Transformer
from wancli.cost.wan_transformer import (
    Flops,
    Forward,
    activation_bytes,
    forward_flops,
    image_flops,
    image_parameters,
    memory_traffic,
    text_flops,
    text_parameters,
    transformer_parameters,
    wide_parameters,
)
from wancli.rollouts.denoiser import PromptPair, causal

NAMED = {n: a for n, a in vars(architectures).items() if isinstance(a, Architecture)}
PUBLISHED = {
    "WAN_1_3B": 1_418_996_800,
    "WAN_14B": 14_288_491_584,
    "WAN_2_1_I2V": 16_394_878_784,
    "WAN_5B": 4_999_787_712,
}
TINY = Transformer(
    layers=2, heads=2, head_dim=12, ffn=32, in_channels=4, out_channels=4, text_dim=16, freq_dim=16
)
named = pytest.mark.parametrize("name", NAMED)


@named
def test_parameters_are_those_of_the_class(name: str):
    shape = NAMED[name].transformer
    model = transformer(shape, dtype=torch.bfloat16)
    assert transformer_parameters(shape) == parameters(model)
    wide = sum(p.numel() for p in model.parameters() if p.dtype == torch.float32)
    assert wide_parameters(shape) == wide


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name: str):
    assert transformer_parameters(NAMED[name].transformer) == PUBLISHED[name]


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.name)
def test_every_known_model_has_a_shape(spec):
    assert spec.architecture in [*NAMED.values(), HunyuanVideo()]
    assert spec.latent_channels == spec.architecture.vae.latent_channels
    assert spec.strides.spatial == spec.architecture.vae.spatial


def test_the_demo_is_what_its_folder_says():
    assert spec_of_folder(DEMO_FOLDER).architecture == architectures.DEMO


@named
def test_flops_are_those_that_torch_counts(name: str):
    shape, frames = NAMED[name].transformer, 3
    if name != "WAN_1_3B":  # all layers take a second
        shape = replace(shape, layers=5, vace_blocks=min(3, shape.vace_blocks))
    model = transformer(shape)
    given = inputs(shape, frames=frames)
    tokens = frames * 2 * 3
    image = {0: 0, 1: 257, 2: 514}[
        len(given.get("encoder_hidden_states_image", ())) if shape.image_dim else 0
    ]
    told = Forward(tokens, tokens, text=512, image=image, frames=frames)
    assert forward_flops(shape, told).flops == flops(lambda: model(**given))


def test_flops_of_a_timestep_for_each_token():
    shape = replace(NAMED["WAN_5B"].transformer, layers=2)
    model, given = transformer(shape), inputs(shape)
    given["timestep"] = torch.empty(1, 18, device="meta")
    told = Forward(18, 18, text=512, timesteps=18)
    assert forward_flops(shape, told).flops == flops(lambda: model(**given))


def test_flops_of_a_prompt_that_is_known():
    model, latents = tiny_transformer(), torch.zeros(1, 4, 3, 4, 6)
    text, time = torch.zeros(1, 9, 16), torch.ones(1)
    with prompt_kv(model, PromptKVCache()):
        first = flops(lambda: model(latents, time, text))
        second = flops(lambda: model(latents, time, text))
    told = Forward(18, 18, text=9)
    assert first == forward_flops(TINY, told).flops
    assert second == forward_flops(TINY, replace(told, reuses_prompt_kv=True)).flops
    assert first > second


def test_flops_of_a_chunk_after_others():
    latents = torch.zeros(1, 4, 2, 4, 6)
    with causal(tiny_transformer(), WindowConfig(5, 1, 2, tokens_per_frame=6)) as model:
        model.set_prompt(PromptPair(torch.zeros(1, 9, 16)))
        for index, keys in enumerate((12, 24, 30, 30)):
            model.begin(Span(index, 2 * index, 2))
            known = index > 0  # the prompt, and this timestep
            told = Forward(12, keys, text=9, reuses_prompt_kv=known, timesteps=int(not known))
            counted = flops(lambda: model.velocity(latents, 500.0))
            assert counted == forward_flops(TINY, told).flops
            model.commit(latents, 0.0)


@pytest.mark.parametrize("shape", [TextEncoder(layers=3), architectures.DEMO.text_encoder])
def test_the_text_encoder_is_umt5(shape: TextEncoder):
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(**text_encoder_config(shape))).eval()
        ids = torch.zeros(1, 64, dtype=torch.long)
    assert text_parameters(shape) == parameters(model)
    assert text_flops(shape, 64).flops == flops(lambda: model(ids))


def test_the_image_encoder_is_clip():
    shape = ImageEncoder(layers=3)
    with torch.device("meta"):
        model = CLIPVisionModel(CLIPVisionConfig(**image_encoder_config(shape))).eval()
        image = torch.empty(1, 3, shape.size, shape.size)
    assert image_parameters(shape) == parameters(model)
    assert image_flops(shape).flops == flops(lambda: model(image))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["WAN_1_3B", "WAN_14B", "WAN_5B", "VACE_14B", "DEMO"])
def test_a_forward_holds_what_the_formula_says(name: str, dtype: torch.dtype):
    shape = NAMED[name].transformer
    shape = replace(shape, layers=2, vace_blocks=min(2, shape.vace_blocks))
    model = transformer(shape, dtype=dtype)
    given = {n: x.to(dtype) for n, x in inputs(shape, frames=21, height=60, width=104).items()}
    held = peak_bytes(model, lambda: model(**given))
    told = activation_bytes(shape, 32_760, element_bytes=dtype.itemsize)
    assert told == pytest.approx(held, rel=0.02)


def test_a_timestep_for_each_token_is_held_as_the_formula_says():
    shape = replace(NAMED["WAN_5B"].transformer, layers=2)
    model, given = transformer(shape), inputs(shape, frames=5, height=60, width=104)
    given["timestep"] = torch.empty(1, 7800, device="meta")
    told = activation_bytes(shape, 7800, element_bytes=4, per_token_time=True)
    assert told == pytest.approx(peak_bytes(model, lambda: model(**given)), rel=0.02)


def test_the_encoders_are_as_large_as_published():
    assert text_parameters(TextEncoder()) == 5_680_910_336
    assert image_parameters(ImageEncoder()) == 630_766_080


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["WAN_1_3B", "WAN_14B", "DEMO"])
def test_a_block_moves_about_what_the_formula_says(name: str, dtype: torch.dtype):
    told, counted = [], []
    for layers in (1, 2):
        shape = replace(NAMED[name].transformer, layers=layers)
        model = transformer(shape, dtype=dtype)
        given = {n: x.to(dtype) for n, x in inputs(shape, frames=21, height=60, width=104).items()}
        counted.append(moved(partial(model, **given)))
        told.append(memory_traffic(shape, 32_760, element_bytes=dtype.itemsize))
    assert told[1] - told[0] == pytest.approx(counted[1] - counted[0], rel=0.03)


def test_work_adds_up_by_kind():
    work = Flops(1, 2, 3) + Flops(10, 20, 30) * 2
    assert work == Flops(21, 42, 63)
    assert work.flops == 126
