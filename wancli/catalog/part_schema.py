"""Types of values in a model folder's JSON files, by key: anybody may have written them.

The libraries accept any value, and fail much later or never. Nearly every key means the same in all
files; any key may be missing, and others may exist.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ValueType:
    """A type of value: its description, and a test."""

    words: str
    holds: Callable[[Any], bool]

    def or_none(self) -> "ValueType":
        """This or null."""
        return ValueType(f"{self.words}, or null", lambda value: value is None or self.holds(value))

    def list(self, *lengths: int) -> "ValueType":
        """A list of these, of any length or one of `lengths`."""

        def holds(value: Any) -> bool:
            well = isinstance(value, list) and all(map(self.holds, value))
            return well and (not lengths or len(value) in lengths)

        return ValueType(f"a list, each {self.words}", holds)


def _whole(least: int, most: int | None = None) -> ValueType:
    def holds(value: Any) -> bool:
        return type(value) is int and least <= value and (most is None or value <= most)

    return ValueType(
        f"a whole number of at least {least}" + (f" and at most {most}" if most else ""), holds
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # false for NaN


_COUNT, _LAYERS, _LIMIT = _whole(1, 2**20), _whole(1, 1000), _whole(1)
_NUMBER = ValueType("a number", _is_number)
_POSITIVE = ValueType("a number over 0", lambda value: _is_number(value) and value > 0)
_FRACTION = ValueType("a number between 0 and 1", lambda value: _is_number(value) and 0 < value < 1)
_FLAG = ValueType("true or false", lambda value: type(value) is bool)
_TEXT = ValueType("text", lambda value: type(value) is str)

_PARTS = (
    "transformer", "transformer_2", "vae", "text_encoder", "text_encoder_2", "image_encoder",
    "tokenizer", "tokenizer_2", "image_processor", "scheduler",
)  # fmt: skip
_COUNTED = (
    # Wan's transformers
    "attention_head_dim", "ffn_dim", "freq_dim", "in_channels", "num_attention_heads",
    "rope_max_seq_len", "text_dim", "vace_in_channels", "face_encoder_hidden_dim",
    "face_encoder_num_heads", "inject_face_latents_blocks", "motion_dim", "motion_encoder_dim",
    "motion_encoder_size", "motion_style_dim",
    # Wan's VAEs
    "base_dim", "num_res_blocks", "scale_factor_spatial", "scale_factor_temporal", "z_dim",
    # text and image encoders
    "d_ff", "d_kv", "d_model", "hidden_size", "image_size", "intermediate_size",
    "max_position_embeddings", "num_heads", "relative_attention_max_distance",
    "relative_attention_num_buckets", "vocab_size",
    # HunyuanVideo
    "latent_channels", "layers_per_block", "patch_size_t", "pooled_projection_dim",
    "spatial_compression_ratio", "temporal_compression_ratio", "text_embed_dim",
    # schedulers
    "num_train_timesteps",
)  # fmt: skip
_LAYERED = (
    "num_layers", "num_hidden_layers", "num_refiner_layers", "num_single_layers",
)  # fmt: skip
_MAYBE_COUNTED = (
    "added_kv_proj_dim", "decoder_base_dim", "head_dim", "image_dim", "num_key_value_heads",
    "out_channels", "pos_embed_seq_len",
)  # fmt: skip
_FLAGGED = (
    "cross_attn_norm", "expand_timesteps", "guidance_embeds", "is_residual",
    "mid_block_add_attention",
)  # fmt: skip
_KINDS: dict[str, ValueType] = {
    **dict.fromkeys(_PARTS, _TEXT.or_none().list(2)),
    **dict.fromkeys(_COUNTED, _COUNT),
    **dict.fromkeys(_LAYERED, _LAYERS),
    **dict.fromkeys(_MAYBE_COUNTED, _COUNT.or_none()),
    **dict.fromkeys(_FLAGGED, _FLAG),
    "_class_name": _TEXT,
    "block_out_channels": _COUNT.list(),
    "boundary_ratio": _FRACTION.or_none(),
    "dim_mult": _COUNT.list(),
    "eps": _POSITIVE,
    "image_condition_type": _TEXT.or_none(),
    "latents_mean": _NUMBER.list(),
    "latents_std": _POSITIVE.list(),
    "layer_norm_epsilon": _POSITIVE,
    "mlp_ratio": _POSITIVE,
    "model_max_length": _LIMIT,  # 10**30 means unlimited
    "scaling_factor": _POSITIVE,
    "temperal_downsample": _FLAG.list(),  # diffusers' spelling
    "vace_layers": _whole(0, 1000).list().or_none(),
}


Kinds = Mapping[str, ValueType]
# Keys whose type depends on the file: Wan's transformers, its VAEs, and all others.
OF_TRANSFORMER: Kinds = {"patch_size": _COUNT.list(3)}
OF_VAE: Kinds = {"patch_size": _COUNT.or_none(), "out_channels": _COUNT}
OF_OTHERS: Kinds = {"patch_size": _COUNT}


def wrong_value(config: Mapping[str, Any], kinds: Kinds | None = None) -> str:
    """Describe the first invalid value of a config; "" if it is valid.

    `kinds` adds keys whose type depends on the file.
    """
    for key, value in config.items():
        kind = (kinds or {}).get(key) or _KINDS.get(key)
        if kind and not kind.holds(value):
            return f"{key} is to be {kind.words}"
    return ""
