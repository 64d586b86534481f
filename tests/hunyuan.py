"""A tiny real HunyuanVideo: random weights, true behaviour."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from tests.fakes import tiny_tokenizer

SIZES: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}
LLAMA: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}
CLIP: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
VAE: dict[str, Any] = {
    "latent_channels": 4,
    "block_out_channels": (4, 4, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
}


def tiny_hunyuan(**transformer: Any) -> HunyuanVideoPipeline:
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        return HunyuanVideoPipeline(
            text_encoder=LlamaModel(LlamaConfig(**LLAMA)).eval(),
            tokenizer=tiny_tokenizer(512),
            transformer=HunyuanVideoTransformer3DModel(**{**SIZES, **transformer}).eval(),
            vae=AutoencoderKLHunyuanVideo(**VAE).eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder_2=CLIPTextModel(CLIPTextConfig(**CLIP)).eval(),
            tokenizer_2=tiny_tokenizer(77),
        )


def tiny_hunyuan_folder(path: Path, **transformer: Any) -> Path:
    """A model folder as diffusers writes it."""
    tiny_hunyuan(**transformer).save_pretrained(path)
    return path
