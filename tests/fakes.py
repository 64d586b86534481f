"""Real classes at sizes for a test: random weights, true behaviour."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

WORDS = ("a", "red", "blue", "circle", "moving", "right", "on", "black", "background")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    vocabulary |= {word: i for i, word in enumerate(WORDS, len(vocabulary))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=16,
    )


def tiny_transformer(seed: int = 0) -> WanTransformer3DModel:
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)  # diffusers takes no generator
        return WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=64,
        ).eval()


def tiny_vae() -> AutoencoderKLWan:
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        return AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.0, 2.0, 0.5, 1.5],
        ).eval()


def tiny_pipeline(*, experts: int = 1) -> WanPipeline:
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        text_encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ).eval()
    return WanPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=text_encoder,
        transformer=tiny_transformer(),
        transformer_2=tiny_transformer(1) if experts == 2 else None,
        boundary_ratio=0.5 if experts == 2 else None,
        vae=tiny_vae(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )


def tiny_folder(path: Path, *, experts: int = 1) -> Path:
    """A model folder as diffusers writes it, 0.2 MB."""
    tiny_pipeline(experts=experts).save_pretrained(path)
    return path
