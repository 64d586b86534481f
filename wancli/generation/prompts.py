"""Encode prompts with the pipelines of each model family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from wancli.caching.prompt_kv import PromptKVCache
from wancli.catalog.tasks import HUNYUAN_VIDEO, WAN
from wancli.config.settings import Sampling
from wancli.models.load import Loaded
from wancli.planning.plan import is_guided

Embeddings = Mapping[str, Tensor]


@dataclass(frozen=True)
class Prompt:
    """Text embeddings and pictures, by the argument names of the pipeline.

    `memory` caches their keys and values in the transformers, which are the same in every step.
    """

    embeddings: Embeddings
    pictures: Mapping[str, Any] = field(default_factory=dict)
    memory: PromptKVCache = field(default_factory=PromptKVCache)


@torch.no_grad()
def encode_prompt(loaded: Loaded, prompt: str, sampling: Sampling) -> Prompt:
    """Embed the prompt, and with guidance also the negative prompt."""
    family = loaded.spec.family
    negative = sampling.negative_prompt if is_guided(sampling, family) else None
    return Prompt(_EMBED[family.name](loaded.pipeline, prompt, negative, loaded.spec.text_length))


def _wan(pipeline: Any, prompt: str, negative: str | None, length: int) -> Embeddings:
    """UMT5 embeddings, each [1, text, D]."""
    cond, uncond = pipeline.encode_prompt(
        prompt,
        negative,
        do_classifier_free_guidance=negative is not None,
        max_sequence_length=length,
    )
    return {"prompt_embeds": cond} | ({} if uncond is None else {"negative_prompt_embeds": uncond})


def _hunyuan(pipeline: Any, prompt: str, negative: str | None, length: int) -> Embeddings:
    """LLaMA embeddings [1, text, D] with their mask, and CLIP's pooled embedding [1, D]."""
    texts = {"": prompt, "negative_": negative}
    embeddings: dict[str, Tensor] = {}
    for prefix, text in texts.items():
        if text is not None:
            tokens, pooled, mask = pipeline.encode_prompt(text, max_sequence_length=length)
            embeddings[f"{prefix}prompt_embeds"] = tokens
            embeddings[f"{prefix}pooled_prompt_embeds"] = pooled
            embeddings[f"{prefix}prompt_attention_mask"] = mask
    return embeddings


_EMBED: Mapping[str, Callable[[Any, str, str | None, int], Embeddings]] = {
    WAN.name: _wan,
    HUNYUAN_VIDEO.name: _hunyuan,
}
