"""Shapes of HunyuanVideo and its kin: two streams of tokens, video and text, that become one.

Sources: https://github.com/Tencent-Hunyuan/HunyuanVideo (fa14b00), hyvideo/modules/models.py#L742,
and the config.json files of https://huggingface.co/hunyuanvideo-community/HunyuanVideo, by their
copies in thu-ml/Hunyuan-RIFLEx-diffusers (transformer), jbilcke-hf/HunyuanVideo-HFIE (VAE) and
FastVideo/FastHunyuan-diffusers (LLaMA); CLIP is openai/clip-vit-large-patch14's text side.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TEXT_TOKENS = 256  # of a prompt, joined with the video's in every block
TEMPLATE_TOKENS = 95  # of diffusers' template, prepended in LLaMA and cut off after it


@dataclass(frozen=True)
class JointTransformer:
    """Blocks of two streams, then of one; attention is of all tokens, the text's included."""

    dual: int = 20  # blocks
    single: int = 40
    refiner: int = 2  # blocks of the text refiner
    heads: int = 24
    head_dim: int = 128
    ffn_ratio: float = 4.0
    in_channels: int = 16
    out_channels: int = 16
    patch: int = 4  # latents per token: 1 x 2 x 2
    text_dim: int = 4096
    pooled_dim: int = 768
    guidance: bool = True  # embeds the guidance scale

    @property
    def dim(self) -> int:
        """Hidden size."""
        return self.heads * self.head_dim

    @property
    def ffn(self) -> int:
        """Hidden size of the feed-forward."""
        return int(self.dim * self.ffn_ratio)


@dataclass(frozen=True)
class Llama:
    """A LLaMA without its head."""

    vocabulary: int = 128_320
    dim: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    ffn: int = 14_336
    layers: int = 32


@dataclass(frozen=True)
class ClipText:
    """A CLIP text transformer."""

    vocabulary: int = 49_408
    positions: int = 77
    dim: int = 768
    ffn: int = 3072
    layers: int = 12


@dataclass(frozen=True)
class CausalVae:
    """A VAE of causal convolutions, with attention over all frames of a tile in its middle."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    res_blocks: int = 2
    latent_channels: int = 16
    spatial: int = 8  # pixels per latent, each way
    temporal: int = 4  # video frames per latent frame
    attention: bool = True
    tile_frames: int = 4  # latent frames decoded at once, plus one of context
    tile_stride: int = 3


@dataclass(frozen=True)
class HunyuanVideo:
    """All parts of one model."""

    transformer: JointTransformer = JointTransformer()
    vae: CausalVae = CausalVae()
    text_encoder: Llama = Llama()
    text_encoder_2: ClipText = ClipText()

    @property
    def blocks(self) -> tuple[int, ...]:
        """Number of blocks in each of the transformer's lists."""
        return self.transformer.dual, self.transformer.single


def hunyuan_of(
    transformer: Mapping[str, Any],
    vae: Mapping[str, Any],
    text: Mapping[str, Any],
    text_2: Mapping[str, Any],
) -> HunyuanVideo | None:
    """The architecture in the parts' config.json; None if they are incomplete."""
    try:
        return HunyuanVideo(_transformer(transformer), _vae(vae), _llama(text), _clip(text_2))
    except (KeyError, TypeError, ValueError):
        return None


def _transformer(config: Mapping[str, Any]) -> JointTransformer:
    return JointTransformer(
        dual=config["num_layers"],
        single=config["num_single_layers"],
        refiner=config["num_refiner_layers"],
        heads=config["num_attention_heads"],
        head_dim=config["attention_head_dim"],
        ffn_ratio=config["mlp_ratio"],
        in_channels=config["in_channels"],
        out_channels=config["out_channels"] or config["in_channels"],
        patch=config["patch_size_t"] * config["patch_size"] ** 2,
        text_dim=config["text_embed_dim"],
        pooled_dim=config["pooled_projection_dim"],
        guidance=config["guidance_embeds"],
    )


def _vae(config: Mapping[str, Any]) -> CausalVae:
    return CausalVae(
        channels=tuple(config["block_out_channels"]),
        res_blocks=config["layers_per_block"],
        latent_channels=config["latent_channels"],
        spatial=config["spatial_compression_ratio"],
        temporal=config["temporal_compression_ratio"],
        attention=config["mid_block_add_attention"],
    )


def _llama(config: Mapping[str, Any]) -> Llama:
    heads, dim = config["num_attention_heads"], config["hidden_size"]
    return Llama(
        vocabulary=config["vocab_size"],
        dim=dim,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or dim // heads,
        ffn=config["intermediate_size"],
        layers=config["num_hidden_layers"],
    )


def _clip(config: Mapping[str, Any]) -> ClipText:
    return ClipText(
        vocabulary=config["vocab_size"],
        positions=config["max_position_embeddings"],
        dim=config["hidden_size"],
        ffn=config["intermediate_size"],
        layers=config["num_hidden_layers"],
    )
