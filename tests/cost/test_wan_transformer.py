"""The closed forms equal the parameters and FLOPs of diffusers' and transformers' classes."""

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

ARCHITECTURES = {n: a for n, a in vars(architectures).items() if isinstance(a, Architecture)}
PUBLISHED = {
    "WAN_1_3B": 1_418_996_800,
    "WAN_14B": 14_288_491_584,
    "WAN_2_1_I2V": 16_394_878_784,
    "WAN_5B": 4_999_787_712,
}
TINY = Transformer(
    layers=2, heads=2, head_dim=12, ffn=32, in_channels=4, out_channels=4, text_dim=16, freq_dim=16
)
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@every_architecture
def test_parameters_match_the_class(name: str):
    shape = ARCHITECTURES[name].transformer
    model = transformer(shape, dtype=torch.bfloat16)
    assert transformer_parameters(shape) == parameters(model)
    wide = sum(p.numel() for p in model.parameters() if p.dtype == torch.float32)
    assert wide_parameters(shape) == wide


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_match_the_published_numbers(name: str):
    assert transformer_parameters(ARCHITECTURES[name].transformer) == PUBLISHED[name]


def test_every_known_model_has_an_architecture():
    for spec in SPECS.values():
        assert spec.architecture
        assert spec.architecture in [*ARCHITECTURES.values(), HunyuanVideo()]
        assert spec.latent_channels == spec.architecture.vae.latent_channels
        assert spec.strides.spatial == spec.architecture.vae.spatial


def test_the_architecture_of_the_demo_matches_its_folder():
    assert spec_of_folder(DEMO_FOLDER).architecture == architectures.DEMO


@every_architecture
def test_flops_match_those_torch_counts(name: str):
    shape, frames = ARCHITECTURES[name].transformer, 3
    if name != "DEMO":  # counting all layers takes a second
        shape = replace(shape, layers=5, vace_blocks=min(3, shape.vace_blocks))
    model = transformer(shape)
    arguments = inputs(shape, frames=frames)
    tokens = frames * 2 * 3
    image = {0: 0, 1: 257, 2: 514}[
        len(arguments.get("encoder_hidden_states_image", ())) if shape.image_dim else 0
    ]
    forward = Forward(tokens, tokens, text=512, image=image, frames=frames)
    assert forward_flops(shape, forward).flops == flops(lambda: model(**arguments))


def test_flops_of_per_token_timesteps_match():
    shape = replace(ARCHITECTURES["WAN_5B"].transformer, layers=2)
    model, arguments = transformer(shape), inputs(shape)
    arguments["timestep"] = torch.empty(1, 18, device="meta")
    forward = Forward(18, 18, text=512, timesteps=18)
    assert forward_flops(shape, forward).flops == flops(lambda: model(**arguments))


def test_flops_with_a_cached_prompt_match():
    model, latents = tiny_transformer(), torch.zeros(1, 4, 3, 4, 6)
    text, time = torch.zeros(1, 9, 16), torch.ones(1)
    with prompt_kv(model, PromptKVCache()):
        first = flops(lambda: model(latents, time, text))
        second = flops(lambda: model(latents, time, text))
    forward = Forward(18, 18, text=9)
    assert first == forward_flops(TINY, forward).flops
    assert second == forward_flops(TINY, replace(forward, reuses_prompt_kv=True)).flops
    assert first > second


def test_flops_of_chunks_with_a_rolling_cache_match():
    latents = torch.zeros(1, 4, 2, 4, 6)
    with causal(tiny_transformer(), WindowConfig(5, 1, 2, tokens_per_frame=6)) as model:
        model.set_prompt(PromptPair(torch.zeros(1, 9, 16)))
        for index, keys in enumerate((12, 24, 30, 30)):
            model.begin(Span(index, 2 * index, 2))
            cached = index > 0  # the prompt, and the embedding of this timestep
            forward = Forward(12, keys, text=9, reuses_prompt_kv=cached, timesteps=int(not cached))
            counted = flops(lambda: model.velocity(latents, 500.0))
            assert counted == forward_flops(TINY, forward).flops
            model.commit(latents, 0.0)


@pytest.mark.parametrize("shape", [TextEncoder(layers=3), architectures.DEMO.text_encoder])
def test_the_text_encoder_matches_umt5(shape: TextEncoder):
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(**text_encoder_config(shape))).eval()
        ids = torch.zeros(1, 64, dtype=torch.long)
    assert text_parameters(shape) == parameters(model)
    assert text_flops(shape, 64).flops == flops(lambda: model(ids))


def test_the_image_encoder_matches_clip():
    shape = ImageEncoder(layers=3)
    with torch.device("meta"):
        model = CLIPVisionModel(CLIPVisionConfig(**image_encoder_config(shape))).eval()
        image = torch.empty(1, 3, shape.size, shape.size)
    assert image_parameters(shape) == parameters(model)
    assert image_flops(shape).flops == flops(lambda: model(image))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["WAN_1_3B", "WAN_14B", "WAN_5B", "VACE_14B", "DEMO"])
def test_peak_memory_of_a_forward_matches_the_formula(name: str, dtype: torch.dtype):
    shape = ARCHITECTURES[name].transformer
    shape = replace(shape, layers=2, vace_blocks=min(2, shape.vace_blocks))
    model = transformer(shape, dtype=dtype)
    arguments = {n: x.to(dtype) for n, x in inputs(shape, frames=21, height=60, width=104).items()}
    peak = peak_bytes(model, lambda: model(**arguments))
    predicted = activation_bytes(shape, 32_760, element_bytes=dtype.itemsize)
    assert predicted == pytest.approx(peak, rel=0.02)


def test_peak_memory_with_per_token_timesteps_matches_the_formula():
    shape = replace(ARCHITECTURES["WAN_5B"].transformer, layers=2)
    model, arguments = transformer(shape), inputs(shape, frames=5, height=60, width=104)
    arguments["timestep"] = torch.empty(1, 7800, device="meta")
    predicted = activation_bytes(shape, 7800, element_bytes=4, per_token_time=True)
    assert predicted == pytest.approx(peak_bytes(model, lambda: model(**arguments)), rel=0.02)


def test_the_encoders_have_their_published_sizes():
    assert text_parameters(TextEncoder()) == 5_680_910_336
    assert image_parameters(ImageEncoder()) == 630_766_080


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["WAN_1_3B", "WAN_14B", "DEMO"])
def test_memory_traffic_of_a_block_matches_the_formula(name: str, dtype: torch.dtype):
    predicted, counted = [], []
    for layers in (1, 2):
        shape = replace(ARCHITECTURES[name].transformer, layers=layers)
        model = transformer(shape, dtype=dtype)
        arguments = {
            n: x.to(dtype) for n, x in inputs(shape, frames=21, height=60, width=104).items()
        }
        counted.append(moved(partial(model, **arguments)))
        predicted.append(memory_traffic(shape, 32_760, element_bytes=dtype.itemsize))
    assert predicted[1] - predicted[0] == pytest.approx(counted[1] - counted[0], rel=0.03)


def test_flops_add_up_by_kind():
    work = Flops(1, 2, 3) + Flops(10, 20, 30) * 2
    assert work == Flops(21, 42, 63)
    assert work.flops == 126
