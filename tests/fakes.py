"""Diffusers' own classes at test sizes: random weights, real behaviour."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from wancli.catalog.tasks import ANIMATE, ENDS, IMAGE, TASKS, TEXT, VACE
from wancli.models.random_weights import ended_by_eos
from wancli.video.ffmpeg import Encoding
from wancli.video.write import VideoWriter

WORDS = ("a", "red", "blue", "circle", "moving", "right", "on", "black", "background")


SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 64,
}
WITH_IMAGE = {"in_channels": 12, "image_dim": 8, "added_kv_proj_dim": 24}
WITH_FACE = {
    "latent_channels": 4,
    "inject_face_latents_blocks": 2,
    "motion_encoder_size": 16,
    "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
    "motion_style_dim": 8,
    "motion_dim": 4,
    "motion_encoder_dim": 8,
    "face_encoder_hidden_dim": 8,
    "face_encoder_num_heads": 2,
    "motion_encoder_batch_size": 2,
}
# What a task adds to its transformer; an image is 5 tokens.
TASK_SIZES: dict[str, dict[str, Any]] = {
    IMAGE: WITH_IMAGE,
    ENDS: {**WITH_IMAGE, "pos_embed_seq_len": 10},
    VACE: {"vace_layers": [0], "vace_in_channels": 4 + 4 + 64},
    ANIMATE: {**WITH_IMAGE, **WITH_FACE},
}


def tiny_tokenizer(length: int = 16) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    vocabulary |= {word: i for i, word in enumerate(WORDS, len(vocabulary))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return ended_by_eos(tokenizer, length=length)


def tiny_transformer(seed: int = 0, task: str = TEXT, **more: Any) -> WanTransformer3DModel:
    kind = getattr(diffusers, TASKS[task].transformer)
    with torch.random.fork_rng():
        torch.random.manual_seed(seed)  # diffusers takes no generator
        return kind(**{**SIZES, **TASK_SIZES.get(task, {}), **more}).eval()


def tiny_vae(**more: Any) -> AutoencoderKLWan:
    sizes = {
        "base_dim": 4,
        "z_dim": 4,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
        "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [1.0, 2.0, 0.5, 1.5],
    }
    with torch.random.fork_rng():
        torch.random.manual_seed(0)  # diffusers takes no generator
        return AutoencoderKLWan(**{**sizes, **more}).eval()


def tiny_image_encoder() -> dict[str, Any]:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "image_size": 16, "patch_size": 8}
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        encoder = CLIPVisionModel(
            CLIPVisionConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
        ).eval()
    return {
        "image_encoder": encoder,
        "image_processor": CLIPImageProcessor(size=16, crop_size=16),
    }


def tiny_pipeline(
    task: str = TEXT, *, experts: int = 1, by_token: bool = False, **more: Any
) -> Any:
    """`by_token` gives every token a timestep, as TI2V-5B does. `more` goes to the transformer."""
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        text_encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ).eval()
    parts: dict[str, Any] = {"transformer": tiny_transformer(0, task, **more)}
    if experts == 2:
        parts |= {"transformer_2": tiny_transformer(1, task, **more), "boundary_ratio": 0.5}
    if by_token:
        parts["expand_timesteps"] = True
    takes_image = parts["transformer"].config.get("image_dim") is not None
    return getattr(diffusers, TASKS[task].pipeline)(
        tokenizer=tiny_tokenizer(512 if takes_image else 16),  # with an image, diffusers takes 512
        text_encoder=text_encoder,
        vae=tiny_vae(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        **parts,
        **(tiny_image_encoder() if takes_image else {}),
    )


def tiny_folder(path: Path, task: str = TEXT, **more: Any) -> Path:
    """A model folder as diffusers writes it, 0.2 MB."""
    tiny_pipeline(task, **more).save_pretrained(path)
    return path


def tiny_image(path: Path, seed: int, size: tuple[int, int] = (48, 32)) -> Path:
    """An image of coarse noise."""
    Image.fromarray(_noise(seed, 1, size)[0]).save(path)
    return path


def tiny_clip(
    path: Path,
    seed: int,
    *,
    frames: int = 5,
    size: tuple[int, int] = (48, 32),
    comment: str = "",
) -> Path:
    """A video of coarse noise at 8 fps."""
    path.write_bytes(_clip(seed, frames, size, comment))
    return path


@cache
def _clip(seed: int, frames: int, size: tuple[int, int], comment: str) -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder, "clip.mp4")
        with VideoWriter(path, size=size, fps=8, encoding=Encoding()) as writer:
            writer.write(_noise(seed, frames, size))
            writer.finish({"comment": comment})
        return path.read_bytes()


def _noise(seed: int, frames: int, size: tuple[int, int]) -> Any:
    width, height = size
    coarse = np.random.default_rng(seed).integers(0, 256, (frames, height // 8, width // 8, 3))
    return coarse.astype(np.uint8).repeat(8, axis=1).repeat(8, axis=2)
