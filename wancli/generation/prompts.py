"""Encode prompts with the pipelines of each model family."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from wancli.caching.prompt_kv import PromptKVCache
from wancli.catalog.tasks import HUNYUAN_VIDEO, WAN
from wancli.config.settings import Sampling
from wancli.models.encoded_texts import Embeddings, EncodedTexts
from wancli.models.load import Loaded
from wancli.planning.plan import is_guided


@dataclass(frozen=True)
class Prompt:
    """Text embeddings and pictures, by the argument names of the pipeline.

    `memory` caches their keys and values in the transformers, which are the same in every step.
    """

    embeddings: Embeddings
    pictures: Mapping[str, Any] = field(default_factory=dict)
    memory: PromptKVCache = field(default_factory=PromptKVCache)


@torch.no_grad()
def encode_prompt(
    loaded: Loaded, prompt: str, sampling: Sampling, *, known: EncodedTexts | None = None,
    ahead: Sequence[str] = (),
) -> Prompt:  # fmt: skip
    """Embed the prompt, and with guidance also the negative prompt, unless they are `known`.

    If the prompt is not, the prompts `ahead` are embedded with it, as many as are kept: under
    `offload model` the text encoder then comes to the device once for all of them.
    """
    family = loaded.spec.family
    known = EncodedTexts() if known is None else known

    def embed(text: str) -> Embeddings:
        return _EMBED[family.name](loaded.pipeline, text, loaded.spec.text_length)

    more = () if prompt in known else ahead
    own = known.get(prompt, embed)
    embeddings = dict(own)
    if is_guided(sampling, family):
        negative = known.get(sampling.negative_prompt, embed)
        embeddings |= {f"negative_{name}": tensor for name, tensor in negative.items()}
    for text in more[: max(0, known.capacity(own) - 2)]:  # so that both of these stay, too
        known.get(text, embed)
    return Prompt(embeddings)


def _wan(pipeline: Any, text: str, length: int) -> Embeddings:
    """UMT5 embeddings [1, text, D]."""
    embeddings, _ = pipeline.encode_prompt(
        text, do_classifier_free_guidance=False, max_sequence_length=length
    )
    return {"prompt_embeds": embeddings}


def _hunyuan(pipeline: Any, text: str, length: int) -> Embeddings:
    """LLaMA embeddings [1, text, D] with their mask, and CLIP's pooled embedding [1, D]."""
    tokens, pooled, mask = pipeline.encode_prompt(text, max_sequence_length=length)
    return {
        "prompt_embeds": tokens, "pooled_prompt_embeds": pooled, "prompt_attention_mask": mask
    }  # fmt: skip


_EMBED: Mapping[str, Callable[[Any, str, int], Embeddings]] = {
    WAN.name: _wan,
    HUNYUAN_VIDEO.name: _hunyuan,
}
