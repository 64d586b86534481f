"""The demo's transformer, text encoder and tokenizer: Wan's own classes, at sizes for a laptop."""

from collections.abc import Sequence

import torch
from diffusers import WanTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from wancli.demo.autoencoder import CHANNELS
from wancli.demo.world import BACKGROUNDS, COLORS, FILLERS, MOTIONS, SHAPES, SYNONYMS, TEMPLATES

TEXT_LENGTH = 64  # tokens; padding is zero vectors and is attended to, as in Wan
TEXT_DIM = 64
HEADS, HEAD_DIM, LAYERS = 4, 32, 8
CHUNK = 3  # latent frames of a causal chunk


def make_transformer() -> WanTransformer3DModel:
    """Transformer with random weights and a zero last layer: its first velocity is zero."""
    with torch.random.fork_rng():
        torch.random.manual_seed(1)  # diffusers takes no generator
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_dim=TEXT_DIM,
            freq_dim=64,
            ffn_dim=4 * HEADS * HEAD_DIM,
            num_layers=LAYERS,
            cross_attn_norm=True,
        )
    torch.nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer with one token per word of the world, lower case; any other word is <unk>."""
    phrases = (*COLORS, *BACKGROUNDS, *SHAPES, *MOTIONS, *TEMPLATES, *FILLERS)
    phrases += tuple(word for words in SYNONYMS.values() for word in words)
    text = " ".join(phrases).format(color="", shape="", motion="", background="")
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    for word in sorted(set(text.replace(",", " , ").split())):
        vocabulary[word] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def make_text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """Text encoder with random weights, trained together with the transformer."""
    with torch.random.fork_rng():
        torch.random.manual_seed(2)
        return UMT5EncoderModel(
            UMT5Config(
                vocab_size=vocabulary,
                d_model=TEXT_DIM,
                d_kv=16,
                d_ff=2 * TEXT_DIM,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
            )
        )


def tokenize(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, each [B, TEXT_LENGTH], as in WanPipeline."""
    batch = tokenizer(
        list(prompts), padding="max_length", max_length=TEXT_LENGTH, truncation=True,
        return_tensors="pt",
    )  # fmt: skip
    return batch.input_ids, batch.attention_mask


def embed(text_encoder: UMT5EncoderModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Embeddings [B, TEXT_LENGTH, TEXT_DIM], zero at padding, as in WanPipeline."""
    states: Tensor = text_encoder(ids, mask).last_hidden_state
    return states * mask[..., None]
