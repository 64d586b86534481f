"""Wan's self-attention as diffusers computes it, with any kernel, and without breaking a graph.

Shapes: B batch, L tokens, H heads, D head size.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.models.transformers import transformer_wan, transformer_wan_animate
from torch import Tensor

from wancli.caching.attention import attend, project, project_out

STOCK = (transformer_wan.WanAttnProcessor, transformer_wan_animate.WanAttnProcessor)


class SelfAttention:
    """Self-attention whose kernel is `attend`'s `backend`, on which compiled graphs depend."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """[B, L, H*D]; `rotary_emb` are cos and sin, each [1, L, 1, D]."""
        query, key, value = project(attn, hidden_states)
        if rotary_emb is not None:
            query, key = rotate(query, *rotary_emb), rotate(key, *rotary_emb)
        mixed = attend(query, key, value, self.backend, mask=attention_mask)
        return project_out(attn, mixed.flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of channels of [B, L, H, D]: the bits of diffusers' own."""
    first, second = x.view(*x.shape[:-1], -1, 2).unbind(-1)
    across = torch.stack((-second, first), -1).flatten(-2)
    return (x * cos + across * sin).type_as(x)


@contextmanager
def self_attention(transformer: Any, backend: str) -> Iterator[None]:
    """Let a Wan transformer's self-attention use this kernel; restored on exit.

    Other transformers, and attentions that another cache has replaced, keep theirs.
    """
    with ExitStack() as undo:
        for name, stock in transformer.attn_processors.items():  # blocks.3.attn1.processor
            attn = transformer.get_submodule(name.removesuffix(".processor"))
            if type(stock) in STOCK and not attn.is_cross_attention:
                undo.callback(attn.set_processor, stock)
                attn.set_processor(SelfAttention(backend))
        yield
