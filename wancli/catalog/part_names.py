"""Names of parameters of the VAE and the text encoder in the original code, and in the libraries.

Original names: wan/modules/vae.py and t5.py of https://github.com/Wan-Video/Wan2.1 (9737cba), and
vae2_2.py of https://github.com/Wan-Video/Wan2.2 (42bf4cf). llama.cpp's, of GGUF files: T5ENCODER
in gguf/constants.py and gguf/tensor_mapping.py of https://pypi.org/project/gguf/0.19.0.
"""

import re

from wancli.catalog.wan import TextEncoder

_OUTSIDE = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
_IN_HALF = {"conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out"}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_IN_BLOCK = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_HALF = re.compile(r"(encoder|decoder)\.(.+)")
_NESTED = re.compile(r"(down|up)samples\.(\d{1,4})\.\1samples\.(\d{1,4})\.(.+)")  # of Wan 2.2
_FLAT = re.compile(r"(down|up)samples\.(\d{1,4})\.(.+)")  # of Wan 2.1
_TEXT = {
    "token_embedding": "shared",
    "norm": "encoder.final_layer_norm",
    "token_embd": "shared",
    "enc.output_norm": "encoder.final_layer_norm",
}
_TEXT_BLOCK = re.compile(r"(?:blocks|enc\.blk)\.(\d{1,4})\.(.+)")
_IN_TEXT_BLOCK = {
    "norm1": "0.layer_norm",
    **{f"attn.{x}": f"0.SelfAttention.{x}" for x in "qkvo"},
    "pos_embedding.embedding": "0.SelfAttention.relative_attention_bias",
    "norm2": "1.layer_norm",
    "ffn.gate.0": "1.DenseReluDense.wi_0",
    "ffn.fc1": "1.DenseReluDense.wi_1",
    "ffn.fc2": "1.DenseReluDense.wo",
    # llama.cpp's
    "attn_norm": "0.layer_norm",
    **{f"attn_{x}": f"0.SelfAttention.{x}" for x in "qkvo"},
    "attn_rel_b": "0.SelfAttention.relative_attention_bias",
    "ffn_norm": "1.layer_norm",
    "ffn_gate": "1.DenseReluDense.wi_0",
    "ffn_up": "1.DenseReluDense.wi_1",
    "ffn_down": "1.DenseReluDense.wo",
}


def vae_name(name: str, *, res_blocks: int) -> str:
    """diffusers' name of a VAE's parameter in the original code; another name as it is.

    `res_blocks` is the number of residual blocks at each size of the encoder, less one of the
    decoder's.
    """
    layer, dot, kind = name.rpartition(".")
    half = _HALF.fullmatch(layer)
    new = _in_half(half[2], res_blocks) if half else _OUTSIDE.get(layer, layer)
    return f"{half[1]}.{new}{dot}{kind}" if half else f"{new}{dot}{kind}"


def _in_half(layer: str, res_blocks: int) -> str:
    if nested := _NESTED.fullmatch(layer):
        way, block, index = nested[1], nested[2], int(nested[3])
        last = index == res_blocks + (way == "up")
        inner = f"{way}sampler" if last else f"resnets.{index}"
        return f"{way}_blocks.{block}.{inner}.{_in_block(nested[4])}"
    if flat := _FLAT.fullmatch(layer):
        way, index, rest = flat[1], int(flat[2]), _in_block(flat[3])
        if way == "down":
            return f"down_blocks.{index}.{rest}"
        block, inside = divmod(index, res_blocks + 2)
        inner = "upsamplers.0" if inside == res_blocks + 1 else f"resnets.{inside}"
        return f"up_blocks.{block}.{inner}.{rest}"
    middle, _, rest = layer.removeprefix("middle.").partition(".")
    if layer.startswith("middle.") and middle in _MIDDLE:
        return f"mid_block.{_MIDDLE[middle]}.{_in_block(rest)}"
    return _IN_HALF.get(layer, layer)


def _in_block(layer: str) -> str:
    return _IN_BLOCK.get(layer, layer)


def text_encoder_name(name: str) -> str:
    """transformers' name of a parameter of Wan's UMT5 encoder; another name as it is."""
    layer, dot, kind = name.rpartition(".")
    block = _TEXT_BLOCK.fullmatch(layer)
    if block and (new := _IN_TEXT_BLOCK.get(block[2])):
        return f"encoder.block.{block[1]}.layer.{new}{dot}{kind}"
    return f"{_TEXT.get(layer, layer)}{dot}{kind}"


def text_encoder_parameters(e: TextEncoder) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of a UMT5 encoder, in transformers' naming."""
    wide, d = e.heads * e.head_dim, e.dim
    inner = {
        **{f"0.SelfAttention.{x}": (wide, d) for x in "qkv"},
        "0.SelfAttention.o": (d, wide),
        "0.SelfAttention.relative_attention_bias": (e.buckets, e.heads),
        "0.layer_norm": (d,),
        "1.layer_norm": (d,),
        **{f"1.DenseReluDense.wi_{x}": (e.ffn, d) for x in "01"},
        "1.DenseReluDense.wo": (d, e.ffn),
    }
    return {"shared.weight": (e.vocabulary, d), "encoder.final_layer_norm.weight": (d,)} | {
        f"encoder.block.{index}.layer.{name}.weight": shape
        for index in range(e.layers)
        for name, shape in inner.items()
    }
