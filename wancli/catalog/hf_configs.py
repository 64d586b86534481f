"""Architectures as config.json of diffusers and transformers."""

from typing import Any

from wancli.catalog.wan import Architecture, Autoencoder, ImageEncoder, TextEncoder, Transformer

# Class of each part; the transformer's depends on the task.
CLASSES = {
    "vae": "AutoencoderKLWan",
    "text_encoder": "UMT5EncoderModel",
    "image_encoder": "CLIPVisionModel",
}


def part_config(shapes: Architecture, part: str) -> dict[str, Any]:
    """Config of a pipeline's part by name. Raises KeyError if there is none."""
    configs = {
        "transformer": transformer_config(shapes.transformer),
        "transformer_2": transformer_config(shapes.transformer),
        "vae": autoencoder_config(shapes.vae),
        "text_encoder": text_encoder_config(shapes.text_encoder),
    }
    if shapes.image_encoder:
        configs["image_encoder"] = image_encoder_config(shapes.image_encoder)
    return configs[part]


def transformer_config(t: Transformer) -> dict[str, Any]:
    """Config of diffusers' Wan transformers: plain, VACE and Wan-Animate."""
    config: dict[str, Any] = {
        "num_layers": t.layers,
        "num_attention_heads": t.heads,
        "attention_head_dim": t.head_dim,
        "ffn_dim": t.ffn,
        "in_channels": t.in_channels,
        "out_channels": t.out_channels,
        "text_dim": t.text_dim,
        "freq_dim": t.freq_dim,
        "rope_max_seq_len": t.positions,
        "image_dim": t.image_dim or None,
        "added_kv_proj_dim": t.dim if t.added_kv else None,
        "pos_embed_seq_len": t.image_positions or None,
    }
    if t.vace_blocks:
        config["vace_layers"] = vace_layers(t)
        config["vace_in_channels"] = t.vace_channels
    if t.face:
        config |= {
            "latent_channels": t.out_channels,
            "motion_encoder_size": t.face.size,
            "motion_style_dim": t.face.style_dim,
            "motion_dim": t.face.motion_dim,
            "motion_encoder_dim": t.face.out_dim,
            "face_encoder_hidden_dim": t.face.hidden_dim,
            "face_encoder_num_heads": t.face.heads,
            "inject_face_latents_blocks": t.face.every,
        }
    return config


def vace_layers(t: Transformer) -> list[int]:
    """Indices of the blocks with a VACE block: evenly spaced, from the first on."""
    return list(range(0, t.layers, -(-t.layers // t.vace_blocks)))


def autoencoder_config(shape: Autoencoder) -> dict[str, Any]:
    """Config of diffusers' AutoencoderKLWan, without the latents' mean and std."""
    return {
        "base_dim": shape.encoder_dim,
        "decoder_base_dim": shape.decoder_dim,
        "z_dim": shape.latent_channels,
        "dim_mult": list(shape.multipliers),
        "num_res_blocks": shape.res_blocks,
        "temperal_downsample": list(shape.temporal),  # diffusers' spelling
        "is_residual": shape.residual,
        "in_channels": shape.pixel_channels,
        "out_channels": shape.pixel_channels,
        "patch_size": shape.patch if shape.patch > 1 else None,
        "scale_factor_spatial": shape.spatial,
    }


def text_encoder_config(e: TextEncoder) -> dict[str, Any]:
    """Config of transformers' UMT5."""
    return {
        "vocab_size": e.vocabulary,
        "d_model": e.dim,
        "d_kv": e.head_dim,
        "d_ff": e.ffn,
        "num_layers": e.layers,
        "num_heads": e.heads,
        "relative_attention_num_buckets": e.buckets,
    }


def image_encoder_config(e: ImageEncoder) -> dict[str, Any]:
    """Config of transformers' CLIP vision model, converted from OpenCLIP's ViT-H/14."""
    return {
        "hidden_size": e.dim,
        "intermediate_size": e.ffn,
        "num_hidden_layers": e.layers,
        "num_attention_heads": e.heads,
        "image_size": e.size,
        "patch_size": e.patch,
        "hidden_act": "gelu",
    }
