"""Architectures of Wan models: the sizes from which parameters and FLOPs follow.

Sources: scripts/convert_wan_to_diffusers.py of https://github.com/huggingface/diffusers (58eb52c);
of the encoders, https://huggingface.co/google/umt5-xxl and OpenCLIP's ViT-H/14.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

IMAGE_TOKENS = 257  # CLIP's tokens of one image
# Rows of the time embedder computed when all tokens share one timestep (prompt K/V): a single row
# would run on another kernel than thousands do, 5e-7 apart.
TIMESTEP_ROWS = 128


@dataclass(frozen=True)
class FaceEncoder:
    """Wan-Animate's face branch; an adapter follows every fifth block."""

    size: int = 512  # pixels of a face crop, each way
    style_dim: int = 512
    motion_dim: int = 20
    out_dim: int = 512
    hidden_dim: int = 1024
    heads: int = 4
    every: int = 5
    linears: int = 5

    @property
    def tokens(self) -> int:
        """Motion tokens per latent frame: one per head, and padding."""
        return self.heads + 1

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the motion encoder at `size` pixels and after each halving, down to 4."""
        halvings = self.size.bit_length() - 3
        return tuple(min(512, 2**14 // (self.size >> i)) for i in range(halvings + 1))


@dataclass(frozen=True)
class Transformer:
    """A Wan transformer. `vace_blocks` and `face` are what VACE and Animate add to it."""

    layers: int
    heads: int
    ffn: int
    head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    positions: int = 1024  # tokens along any axis that diffusers' rotary table has rows for
    patch: int = 4  # latents per token: 1 x 2 x 2
    image_dim: int = 0  # of the image encoder's tokens; 0 without image conditioning
    image_positions: int = 0  # learned positions of image tokens
    added_kv: bool = False  # separate K/V projections for image tokens
    vace_blocks: int = 0
    vace_channels: int = 96
    face: FaceEncoder | None = None

    @property
    def dim(self) -> int:
        """Hidden size."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class TextEncoder:
    """A T5 encoder with relative positions of its own in every layer (UMT5)."""

    vocabulary: int = 256_384
    dim: int = 4096
    heads: int = 64
    head_dim: int = 64
    ffn: int = 10_240
    layers: int = 24
    buckets: int = 32


@dataclass(frozen=True)
class ImageEncoder:
    """A CLIP vision transformer."""

    dim: int = 1280
    ffn: int = 5120
    layers: int = 32
    heads: int = 16
    patch: int = 14
    size: int = 224

    @property
    def tokens(self) -> int:
        """Patches and the class token."""
        return (self.size // self.patch) ** 2 + 1


@dataclass(frozen=True)
class Autoencoder:
    """A Wan VAE. `residual` is that of Wan 2.2, which patchifies pixels."""

    encoder_dim: int = 96
    decoder_dim: int = 96
    latent_channels: int = 16
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    temporal: tuple[bool, ...] = (False, True, True)  # which downsamplings include time
    residual: bool = False
    pixel_channels: int = 3  # per patch
    patch: int = 1

    @property
    def spatial(self) -> int:
        """Pixels per latent, each way."""
        return int(2 ** (len(self.multipliers) - 1) * self.patch)


@dataclass(frozen=True)
class Architecture:
    """All parts of one model."""

    transformer: Transformer
    vae: Autoencoder = Autoencoder()
    text_encoder: TextEncoder = TextEncoder()
    image_encoder: ImageEncoder | None = None

    @property
    def blocks(self) -> tuple[int, ...]:
        """Number of blocks in each of the transformer's lists (here one)."""
        return (self.transformer.layers,)


VAE_2_2 = Autoencoder(160, 256, 48, residual=True, pixel_channels=12, patch=2)
_1_3B = Transformer(layers=30, heads=12, ffn=8960)
_I2V_2_1 = {"in_channels": 36, "image_dim": 1280, "added_kv": True}


def _of_14b(**more: Any) -> Transformer:
    return Transformer(layers=40, heads=40, ffn=13_824, **more)


WAN_1_3B = Architecture(_1_3B)
WAN_14B = Architecture(_of_14b())
WAN_5B = Architecture(
    Transformer(layers=30, heads=24, ffn=14_336, in_channels=48, out_channels=48), VAE_2_2
)
WAN_2_1_I2V = Architecture(_of_14b(**_I2V_2_1), image_encoder=ImageEncoder())
WAN_2_2_I2V = Architecture(_of_14b(in_channels=36))
WAN_FLF2V = Architecture(
    _of_14b(**_I2V_2_1, image_positions=2 * IMAGE_TOKENS), image_encoder=ImageEncoder()
)
VACE_1_3B = Architecture(replace(_1_3B, vace_blocks=15))
VACE_14B = Architecture(_of_14b(vace_blocks=8))
ANIMATE_14B = Architecture(_of_14b(**_I2V_2_1, face=FaceEncoder()), image_encoder=ImageEncoder())
DEMO = Architecture(
    Transformer(
        layers=8, heads=4, ffn=512, head_dim=32, in_channels=8, out_channels=8,
        text_dim=64, freq_dim=64,
    ),
    Autoencoder(32, 32, 8, (1, 2, 2), 1, (True, True), residual=True, pixel_channels=12, patch=2),
    TextEncoder(vocabulary=74, dim=64, heads=4, head_dim=16, ffn=128, layers=2),
)  # fmt: skip


def architecture_of(
    transformer: Mapping[str, Any],
    vae: Mapping[str, Any],
    text: Mapping[str, Any],
    image: Mapping[str, Any],
) -> Architecture | None:
    """The architecture in the parts' config.json; None if the transformer's is incomplete.

    `image` is empty without an image encoder.
    """
    try:
        encoder = text_encoder_of(text) if text else TextEncoder()
        sees = image_encoder_of(image) if image else None
        return Architecture(transformer_of(transformer), autoencoder_of(vae), encoder, sees)
    except (KeyError, TypeError, ValueError):
        return None


def transformer_of(config: Mapping[str, Any]) -> Transformer:
    """Parse diffusers' config.json of a Wan transformer. Raises KeyError if it is incomplete."""
    sizes = {
        "layers": config["num_layers"],
        "heads": config["num_attention_heads"],
        "head_dim": config["attention_head_dim"],
        "ffn": config["ffn_dim"],
        "image_dim": config.get("image_dim") or 0,
        "image_positions": config.get("pos_embed_seq_len") or 0,
        "added_kv": config.get("added_kv_proj_dim") is not None,
        "vace_blocks": len(config.get("vace_layers") or ()),
        "vace_channels": config.get("vace_in_channels", 96),
        "face": _face_of(config) if "motion_encoder_size" in config else None,
    }
    same = ("in_channels", "out_channels", "text_dim", "freq_dim")
    sizes |= {name: config[name] for name in same if config.get(name)}
    if "rope_max_seq_len" in config:
        sizes["positions"] = config["rope_max_seq_len"]
    if "patch_size" in config:
        frames, height, width = config["patch_size"]
        sizes["patch"] = frames * height * width
    return Transformer(**sizes)


def autoencoder_of(config: Mapping[str, Any]) -> Autoencoder:
    """Parse diffusers' config.json of a Wan VAE."""
    plain = Autoencoder()
    base = config.get("base_dim", plain.encoder_dim)
    return Autoencoder(
        encoder_dim=base,
        decoder_dim=config.get("decoder_base_dim") or base,
        latent_channels=config.get("z_dim", plain.latent_channels),
        multipliers=tuple(config.get("dim_mult", plain.multipliers)),
        res_blocks=config.get("num_res_blocks", plain.res_blocks),
        temporal=tuple(config.get("temperal_downsample", plain.temporal)),  # diffusers' spelling
        residual=config.get("is_residual", False),
        pixel_channels=config.get("out_channels", plain.pixel_channels),
        patch=config.get("patch_size") or 1,
    )


def text_encoder_of(config: Mapping[str, Any]) -> TextEncoder:
    """Parse transformers' config.json of a UMT5 encoder. Raises KeyError for another."""
    return TextEncoder(
        vocabulary=config["vocab_size"],
        dim=config["d_model"],
        heads=config["num_heads"],
        head_dim=config["d_kv"],
        ffn=config["d_ff"],
        layers=config["num_layers"],
        buckets=config.get("relative_attention_num_buckets", 32),
    )


def image_encoder_of(config: Mapping[str, Any]) -> ImageEncoder:
    """Parse transformers' config.json of a CLIP vision model. Raises KeyError for another."""
    return ImageEncoder(
        dim=config["hidden_size"],
        ffn=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        patch=config["patch_size"],
        size=config["image_size"],
    )


def _face_of(config: Mapping[str, Any]) -> FaceEncoder:
    return FaceEncoder(
        size=config["motion_encoder_size"],
        style_dim=config["motion_style_dim"],
        motion_dim=config["motion_dim"],
        out_dim=config["motion_encoder_dim"],
        hidden_dim=config["face_encoder_hidden_dim"],
        heads=config["face_encoder_num_heads"],
        every=config["inject_face_latents_blocks"],
    )
