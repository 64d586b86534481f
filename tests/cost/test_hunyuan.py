"""The closed forms equal the parameters and FLOPs of HunyuanVideo's own classes."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from tests import hunyuan
from tests.shapes import flops, moved, parameters, peak_bytes
from wancli.catalog.hunyuan import CausalVae, HunyuanVideo, JointTransformer, Llama, hunyuan_of
from wancli.catalog.specs import SPECS
from wancli.cost.hunyuan import (
    causal_decode_bytes,
    causal_decode_flops,
    causal_vae_parameters,
    clip_text_flops,
    clip_text_parameters,
    hunyuan_usage,
    joint_activation_bytes,
    joint_flops,
    joint_memory_traffic,
    joint_parameters,
    llama_activation_bytes,
    llama_flops,
    llama_parameters,
    tiles,
)
from wancli.cost.resources import Precision
from wancli.cost.wan_vae import Grid

META = torch.device("meta")
PUBLISHED: dict[str, Any] = {  # config.json of hunyuanvideo-community/HunyuanVideo, by part
    "transformer": {
        "in_channels": 16, "out_channels": 16, "num_attention_heads": 24,
        "attention_head_dim": 128, "num_layers": 20, "num_single_layers": 40,
        "num_refiner_layers": 2, "mlp_ratio": 4.0, "patch_size": 2, "patch_size_t": 1,
        "qk_norm": "rms_norm", "guidance_embeds": True, "text_embed_dim": 4096,
        "pooled_projection_dim": 768, "rope_theta": 256.0, "rope_axes_dim": [16, 56, 56],
    },
    "vae": {
        "block_out_channels": [128, 256, 512, 512], "latent_channels": 16, "layers_per_block": 2,
        "mid_block_add_attention": True, "norm_num_groups": 32, "scaling_factor": 0.476986,
        "spatial_compression_ratio": 8, "temporal_compression_ratio": 4,
    },
    "text_encoder": {
        "vocab_size": 128_320, "hidden_size": 4096, "intermediate_size": 14_336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "text_encoder_2": {
        "vocab_size": 49_408, "hidden_size": 768, "intermediate_size": 3072,
        "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 77,
    },
}  # fmt: skip
TINY = hunyuan_of(
    {**hunyuan.SIZES, "patch_size": 2, "patch_size_t": 1, "guidance_embeds": True},
    {**hunyuan.VAE, "spatial_compression_ratio": 8, "temporal_compression_ratio": 4,
     "mid_block_add_attention": True},
    hunyuan.LLAMA,
    {**hunyuan.CLIP, "max_position_embeddings": 77},
)  # fmt: skip
assert TINY
SHAPES = {"published": HunyuanVideo(), "tiny": TINY}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def transformer(t: JointTransformer, dtype: torch.dtype = torch.float32) -> Any:
    with META:
        model = HunyuanVideoTransformer3DModel(
            in_channels=t.in_channels,
            out_channels=t.out_channels,
            num_attention_heads=t.heads,
            attention_head_dim=t.head_dim,
            num_layers=t.dual,
            num_single_layers=t.single,
            num_refiner_layers=t.refiner,
            mlp_ratio=t.ffn_ratio,
            guidance_embeds=t.guidance,
            text_embed_dim=t.text_dim,
            pooled_projection_dim=t.pooled_dim,
            rope_axes_dim=(16, 56, 56) if t.head_dim == 128 else (4, 6, 6),
        ).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def inputs(t: JointTransformer, latents: Grid, dtype: torch.dtype = torch.float32) -> Any:
    empty = partial(torch.empty, device=META, dtype=dtype)
    return {
        "hidden_states": empty(1, t.in_channels, latents.frames, latents.height, latents.width),
        "timestep": empty(1),
        "encoder_hidden_states": empty(1, 256, t.text_dim),
        "encoder_attention_mask": empty(1, 256),
        "pooled_projections": empty(1, t.pooled_dim),
        "guidance": empty(1),
    }


def vae(shape: CausalVae) -> AutoencoderKLHunyuanVideo:
    with META:
        return AutoencoderKLHunyuanVideo(
            latent_channels=shape.latent_channels,
            block_out_channels=shape.channels,
            layers_per_block=shape.res_blocks,
            norm_num_groups=2,
        ).eval()


def llama(config: dict[str, Any]) -> LlamaModel:
    with META:
        return LlamaModel(LlamaConfig(**config)).eval()


def test_the_published_model_has_12_8_billion_parameters():
    shape = SPECS["hunyuanvideo"].architecture
    assert shape == hunyuan_of(*PUBLISHED.values())
    assert isinstance(shape, HunyuanVideo)
    with META:
        model = HunyuanVideoTransformer3DModel(**PUBLISHED["transformer"])
        decoder = AutoencoderKLHunyuanVideo(**PUBLISHED["vae"])
    assert joint_parameters(shape.transformer) == parameters(model) == 12_821_012_544
    assert causal_vae_parameters(shape.vae) == parameters(decoder) == 246_478_803
    assert llama_parameters(shape.text_encoder) == 7_505_186_816
    assert clip_text_parameters(shape.text_encoder_2) == 123_060_480


@pytest.mark.parametrize("guidance", [True, False])
def test_parameters_and_flops_of_a_tiny_transformer_match_the_formulas(guidance: bool):
    shape = replace(SHAPES["tiny"].transformer, guidance=guidance)
    model, arguments = transformer(shape), inputs(shape, Grid(3, 4, 6))
    assert joint_parameters(shape) == parameters(model)
    assert joint_flops(shape, 18).flops == flops(lambda: model(**arguments))


def test_flops_of_a_forward_match_those_torch_counts():
    shape = replace(HunyuanVideo().transformer, dual=2, single=4)  # counting all takes 2 s
    model, arguments = transformer(shape), inputs(shape, Grid(3, 4, 6))
    assert joint_flops(shape, 18).flops == flops(lambda: model(**arguments))


@pytest.mark.slow
@shapes
def test_parameters_and_flops_of_the_vae_match_the_formulas(shape: HunyuanVideo):
    assert causal_vae_parameters(shape.vae) == parameters(vae(shape.vae))
    for frames in (1, 4, 5, 9, 10) if shape == TINY else (1, 5):
        latents = torch.empty(1, shape.vae.latent_channels, frames, 4, 6, device=META)
        counted = flops(partial(vae(shape.vae).decode, latents))
        assert causal_decode_flops(shape.vae, Grid(frames, 4, 6)).flops == counted


@pytest.mark.slow
@pytest.mark.parametrize("grid", [Grid(2, 32, 32), Grid(1, 33, 20), Grid(6, 34, 26)], ids=str)
def test_flops_of_spatial_tiles_match_the_formula(grid: Grid):
    shape = SHAPES["tiny"].vae
    model = vae(shape)
    model.enable_tiling()
    latents = torch.empty(
        1, shape.latent_channels, grid.frames, grid.height, grid.width, device=META
    )
    counted = flops(partial(model.decode, latents))
    assert causal_decode_flops(shape, grid, tiled=True).flops == counted


def test_temporal_tiles_overlap():
    assert tiles(CausalVae(), 4) == [4]
    assert tiles(CausalVae(), 33) == [5] * 10 + [3]


@pytest.mark.parametrize("name", ["published", "tiny"])
def test_the_text_encoders_match_llama_and_clip(name: str):
    first = PUBLISHED["text_encoder"] if name == "published" else hunyuan.LLAMA
    second = PUBLISHED["text_encoder_2"] if name == "published" else hunyuan.CLIP
    shape, other = SHAPES[name].text_encoder, SHAPES[name].text_encoder_2
    model = llama(first)
    with META:
        clip = CLIPTextModel(CLIPTextConfig(**second)).eval()
        ids, words = (torch.zeros(1, n, dtype=torch.long) for n in (351, 77))
    assert llama_parameters(shape) == parameters(model)
    assert llama_flops(shape, 351).flops == flops(lambda: model(ids))
    assert clip_text_parameters(other) == parameters(clip)
    assert clip_text_flops(other).flops == flops(lambda: clip(words))


def test_peak_memory_of_the_first_text_encoder_matches_the_formula():
    model = llama(PUBLISHED["text_encoder"])
    ids = torch.zeros(1, 351, dtype=torch.long, device=META)
    peak = peak_bytes(model, lambda: model(ids, output_hidden_states=True))
    assert llama_activation_bytes(Llama(), 351, element_bytes=4) == pytest.approx(peak, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_and_traffic_of_a_forward_match_the_formulas(dtype: torch.dtype):
    shape = replace(JointTransformer(), dual=1, single=2)
    model, arguments = transformer(shape, dtype), inputs(shape, Grid(9, 40, 60), dtype)
    rows, size = 5400 + 256, dtype.itemsize
    peak, traffic = peak_bytes(model, lambda: model(**arguments)), moved(lambda: model(**arguments))
    assert joint_activation_bytes(shape, rows, element_bytes=size) == pytest.approx(peak, rel=0.03)
    assert joint_memory_traffic(shape, rows, element_bytes=size) == pytest.approx(traffic, rel=0.03)


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_peak_memory_of_decoding_matches_the_formula(frames: int):
    model, grid = vae(CausalVae()), Grid(frames, 30, 40)
    latents = torch.empty(1, 16, frames, 30, 40, device=META)
    peak = peak_bytes(model, lambda: model.decode(latents))
    assert causal_decode_bytes(CausalVae(), grid) == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("grid", [Grid(1, 40, 34), Grid(5, 40, 34)], ids=str)
def test_peak_memory_of_tiled_decoding_matches_the_formula(grid: Grid):
    model = vae(CausalVae())
    model.enable_tiling()
    latents = torch.empty(1, 16, grid.frames, grid.height, grid.width, device=META)
    peak = peak_bytes(model, lambda: model.decode(latents))
    assert causal_decode_bytes(CausalVae(), grid, tiled=True) == pytest.approx(peak, rel=0.05)


@shapes
def test_offload_keeps_a_layer_or_a_block_of_each_part_on_the_device(shape: HunyuanVideo):
    parts = {
        "transformer": transformer(shape.transformer),
        "vae": vae(shape.vae),
        "text_encoder": llama(
            PUBLISHED["text_encoder"] if shape == HunyuanVideo() else hunyuan.LLAMA
        ),
    }
    usage = hunyuan_usage(
        shape, Precision(size=4, vae=4), latents=Grid(3, 4, 6), tokens=18, forwards=1, prompts=1
    )
    for name, model in parts.items():
        weight_sizes = usage.weight_sizes[name]
        own = [sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()]
        assert weight_sizes.whole == 4 * parameters(model)
        assert weight_sizes.layer == 4 * max(own), name
    model = parts["transformer"]
    lists = [*model.transformer_blocks, *model.single_transformer_blocks]
    sizes = [parameters(block) for block in lists]
    assert usage.weight_sizes["transformer"].group == 4 * (
        parameters(model) - sum(sizes) + max(sizes)
    )
    assert usage.weight_sizes["vae"].group == usage.weight_sizes["vae"].whole
    assert usage.weight_sizes["text_encoder"].group == usage.weight_sizes["text_encoder"].layer
