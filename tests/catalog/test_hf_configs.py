"""Architectures convert to the published configurations and back.

Published: scripts/convert_wan_to_diffusers.py of https://github.com/huggingface/diffusers,
7d56827;
https://huggingface.co/google/umt5-xxl; the image_encoder of Wan-AI/Wan2.1-I2V-14B-480P-Diffusers.
"""

import inspect
from typing import Any

import diffusers
import pytest
from diffusers import AutoencoderKLWan, WanVACETransformer3DModel

from wancli.catalog.hf_configs import (
    autoencoder_config,
    image_encoder_config,
    part_config,
    text_encoder_config,
    transformer_config,
)
from wancli.catalog.random import keep_layers
from wancli.catalog.specs import SPECS
from wancli.catalog.tasks import TASKS, WAN
from wancli.catalog.wan import autoencoder_of, text_encoder_of, transformer_of

WAN_CONFIG = {
    "added_kv_proj_dim": None, "attention_head_dim": 128, "cross_attn_norm": True, "eps": 1e-06,
    "freq_dim": 256, "in_channels": 16, "out_channels": 16, "patch_size": (1, 2, 2),
    "qk_norm": "rms_norm_across_heads", "text_dim": 4096, "rope_max_seq_len": 1024,
    "pos_embed_seq_len": None, "image_dim": None,
}  # fmt: skip
CONFIG_1_3B = {**WAN_CONFIG, "ffn_dim": 8960, "num_attention_heads": 12, "num_layers": 30}
CONFIG_14B = {**WAN_CONFIG, "ffn_dim": 13824, "num_attention_heads": 40, "num_layers": 40}
CONFIG_5B = {**WAN_CONFIG, "ffn_dim": 14336, "num_attention_heads": 24, "num_layers": 30}
CONFIG_I2V = {**CONFIG_14B, "image_dim": 1280, "added_kv_proj_dim": 5120, "in_channels": 36}
PUBLISHED: dict[str, dict[str, Any]] = {
    "wan2.1-t2v-1.3b": CONFIG_1_3B,
    "self-forcing": CONFIG_1_3B,
    "wan2.1-t2v-14b": CONFIG_14B,
    "wan2.2-t2v-a14b": CONFIG_14B,
    "self-forcing-a14b": CONFIG_14B,
    "wan2.1-i2v-14b-480p": CONFIG_I2V,
    "wan2.1-i2v-14b-720p": CONFIG_I2V,
    "wan2.1-flf2v-14b": {**CONFIG_I2V, "pos_embed_seq_len": 257 * 2},
    "wan2.1-vace-1.3b": {
        **CONFIG_1_3B, "vace_layers": [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28],
        "vace_in_channels": 96,
    },
    "wan2.1-vace-14b": {
        **CONFIG_14B, "vace_layers": [0, 5, 10, 15, 20, 25, 30, 35], "vace_in_channels": 96
    },
    "wan2.2-i2v-a14b": {**CONFIG_14B, "in_channels": 36},
    "wan2.2-ti2v-5b": {**CONFIG_5B, "in_channels": 48, "out_channels": 48},
    "wan2.2-animate-14b": {
        **CONFIG_I2V, "motion_encoder_size": 512, "motion_style_dim": 512, "motion_dim": 20,
        "motion_encoder_dim": 512, "face_encoder_hidden_dim": 1024, "face_encoder_num_heads": 4,
        "inject_face_latents_blocks": 5,
    },
}  # fmt: skip
VAE_2_1 = {
    "base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
    "temperal_downsample": [False, True, True], "is_residual": False, "in_channels": 3,
    "out_channels": 3, "patch_size": None, "scale_factor_spatial": 8, "scale_factor_temporal": 4,
}  # fmt: skip
VAE_2_2 = {
    **VAE_2_1, "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True,
    "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16,
}  # fmt: skip
UMT5_XXL = {
    "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
    "num_heads": 64, "relative_attention_num_buckets": 32,
}  # fmt: skip
CLIP = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "patch_size": 14,
    "num_attention_heads": 16, "image_size": 224, "hidden_act": "gelu",
}  # fmt: skip


WANS = [spec for spec in SPECS.values() if spec.family is WAN]


def defaults(kind: Any) -> dict[str, Any]:
    """Default arguments of a class."""
    return {name: p.default for name, p in inspect.signature(kind).parameters.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformer_configs_match_the_published_ones(name: str):
    spec, published = SPECS[name], PUBLISHED[name]
    kind = defaults(getattr(diffusers, TASKS[spec.tasks[0]].transformer))
    config = {**kind, **transformer_config(spec.wan.transformer)}
    assert {key: config[key] for key in published} == published


def test_every_known_wan_is_published_or_a_checkpoint_or_the_demo():
    assert {*PUBLISHED, "demo"} == {spec.name for spec in WANS if not spec.checkpoint}


@pytest.mark.parametrize("name", PUBLISHED)
def test_vae_and_encoder_configs_match_the_published_ones(name: str):
    spec = SPECS[name]
    vae = VAE_2_2 if name == "wan2.2-ti2v-5b" else VAE_2_1
    config = {**defaults(AutoencoderKLWan), **autoencoder_config(spec.wan.vae)}
    assert {key: config[key] for key in vae} == vae
    assert text_encoder_config(spec.wan.text_encoder) == UMT5_XXL
    if spec.image_encoder:
        assert spec.wan.image_encoder
        assert image_encoder_config(spec.wan.image_encoder) == CLIP
    else:
        with pytest.raises(KeyError):
            part_config(spec.wan, "image_encoder")


@pytest.mark.parametrize("layers", [None, 1, 2, 5, 20])
def test_architectures_survive_a_round_trip_through_their_configs(layers: int | None):
    for spec in WANS:
        shapes = keep_layers(spec.wan, layers) if layers else spec.wan
        assert transformer_of(transformer_config(shapes.transformer)) == shapes.transformer
        assert autoencoder_of(autoencoder_config(shapes.vae)) == shapes.vae
        assert text_encoder_of(text_encoder_config(shapes.text_encoder)) == shapes.text_encoder


@pytest.mark.parametrize("name", ["wan2.1-vace-1.3b", "wan2.1-vace-14b"])
def test_vace_blocks_refer_only_to_blocks_that_exist(name: str):
    architecture = SPECS[name].wan
    whole = transformer_config(architecture.transformer)["vace_layers"]
    for layers in range(1, 41):
        config = transformer_config(keep_layers(architecture, layers).transformer)
        assert len(config["vace_layers"]) == sum(block < layers for block in whole)
        assert config["vace_layers"][0] == 0
        assert config["vace_layers"][-1] < config["num_layers"]
    assert "vace_layers" in defaults(WanVACETransformer3DModel)
