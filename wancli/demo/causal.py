"""Teacher forcing for the demo: clean and noisy latent frames side by side in one forward.

As in Self-Forcing (arXiv:2506.08009) and CausVid (arXiv:2412.07772), clean chunks attend to clean
chunks up to their own, noisy chunks to the clean chunks before them and to themselves. At
inference, a rolling K/V cache computes the same.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

QuerySpan = tuple[slice, list[slice]]  # rows of queries, and rows of the keys they attend to


@dataclass(frozen=True)
class Slot:
    """One latent frame of the sequence."""

    position: int  # latent frame in the video, for RoPE
    chunk: int
    clean: bool


def slots(*, clean: int, noisy: range, chunk: int) -> list[Slot]:
    """Slots of the first `clean` chunks, then of the `noisy` ones; `chunk` is in latent frames."""

    def frames(chunks: range, *, clean: bool) -> list[Slot]:
        return [Slot(c * chunk + i, c, clean) for c in chunks for i in range(chunk)]

    return frames(range(clean), clean=True) + frames(noisy, clean=False)


def attention_mask(layout: Sequence[Slot]) -> Tensor:
    """[frames, frames], True where the row's latent frame attends to the column's."""

    def attends(query: Slot, key: Slot) -> bool:
        if key.clean:
            return key.chunk < query.chunk or (query.clean and key.chunk == query.chunk)
        return not query.clean and key.chunk == query.chunk

    return torch.tensor([[attends(query, key) for key in layout] for query in layout])


def query_spans(layout: Sequence[Slot], tokens_per_frame: int) -> list[QuerySpan]:
    """`attention_mask` as (queries, keys) slices of tokens, at a third of its FLOPs."""

    def tokens(frames: Sequence[int]) -> slice:
        return slice(frames[0] * tokens_per_frame, (frames[-1] + 1) * tokens_per_frame)

    mask, out = attention_mask(layout), []
    runs = groupby(enumerate(layout), lambda frame: (frame[1].chunk, frame[1].clean))
    for (_, clean), group in runs:
        queries = [index for index, _ in group]
        past = [i for i, slot in enumerate(layout) if mask[queries[0], i] and slot.clean]
        keys = [tokens(past)] if past else []
        out.append((tokens(queries), keys if clean else [*keys, tokens(queries)]))
    return out


class DenseAttention:
    """Wan attention; on a CPU unfused, which is 1.5 times faster in training than fused.

    `spans` are the keys of each run of queries; None is all keys.
    """

    def __init__(self, spans: Sequence[QuerySpan] | None = None) -> None:
        self.spans = spans

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """[B, tokens, D] attends to itself or to [B, text, D]."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(context)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(context).unflatten(2, (attn.heads, -1))
        if rotary_emb is not None:
            query, key = (_rotate(x, *rotary_emb) for x in (query, key))
        out: Tensor = attn.to_out[0](attend_spans(query, key, value, self.spans).flatten(2))
        return out


def attend_spans(
    query: Tensor, key: Tensor, value: Tensor, spans: Sequence[QuerySpan] | None = None
) -> Tensor:
    """[B, L, H, D] attends to [B, M, H, D]: each run of queries to its keys, or all to all."""
    if spans is None:
        return _attend(query, key, value)
    # Split once: the gradient of each slice would be as large as the whole.
    sizes = [rows.stop - rows.start for rows, _ in spans]
    queries, keys, values = (torch.split(x, sizes, 1) for x in (query, key, value))
    out = []
    for run, (_, reach) in zip(queries, spans, strict=True):
        seen = [
            i for i, (rows, _) in enumerate(spans)
            if any(part.start <= rows.start < part.stop for part in reach)
        ]  # fmt: skip
        out.append(_attend(run, *(torch.cat([x[i] for i in seen], 1) for x in (keys, values))))
    return torch.cat(out, 1)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, L, H, D] attends to [B, M, H, D]."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if query.is_cuda:
        return nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    weights = scores.float().softmax(-1).to(value.dtype)
    out: Tensor = (weights @ value).transpose(1, 2)
    return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of channels; x [B, L, H, D], cos and sin [1, L, 1, D]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    return turned.flatten(-2).to(x.dtype)


class PlacedRope(nn.Module):
    """The transformer's rotary embedding at the positions [frames] of a layout."""

    def __init__(self, rope: nn.Module, positions: Tensor) -> None:
        super().__init__()
        self.rope, self.positions = rope, positions

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each [1, tokens, 1, head_dim], of latents [B, C, F, H, W]."""
        through: Any = self.rope.max_seq_len  # of any position: a CUDA graph cannot read it
        longer = torch.empty(1, 1, through, *latents.shape[3:], device="meta")
        cos, sin = (t.unflatten(1, (through, -1)) for t in self.rope(longer))
        return cos[:, self.positions].flatten(1, 2), sin[:, self.positions].flatten(1, 2)


class Layout:
    """A sequence of slots, and the attention and RoPE that lay it out in a transformer."""

    def __init__(
        self, layout: Sequence[Slot] | None, *, tokens_per_frame: int, device: str = "cpu"
    ) -> None:
        self.slots = layout
        spans = query_spans(layout, tokens_per_frame) if layout else None
        self.self_attention = DenseAttention(spans)
        self.cross_attention = DenseAttention()
        self.positions = torch.tensor([slot.position for slot in layout or ()], device=device)

    @contextmanager
    def applied_to(
        self, transformer: WanTransformer3DModel, *, first: int | Tensor = 0
    ) -> Iterator[None]:
        """Lay out the sequence from latent frame `first`; restores the transformer on exit."""
        processors, rope = dict(transformer.attn_processors), transformer.rope
        ours = {
            n: self.self_attention if ".attn1." in n else self.cross_attention for n in processors
        }
        transformer.set_attn_processor(ours)
        if self.slots:
            transformer.rope = PlacedRope(rope, self.positions + first)
        try:
            yield
        finally:
            transformer.rope = rope
            transformer.set_attn_processor(processors)


def causal_velocity(
    transformer: WanTransformer3DModel,
    clean: Tensor,
    noisy: Tensor,
    sigmas: Tensor,
    embeddings: Tensor,
) -> Tensor:
    """Velocity [B, C, noisy F, H, W] of the noisy frames, within `Layout.applied_to`.

    clean [B, C, F', H, W]; sigmas [B, noisy F], one per latent frame; embeddings [B, text, D].
    """
    patch = transformer.config.patch_size
    per_frame = noisy.shape[3] * noisy.shape[4] // (patch[1] * patch[2])
    timesteps = nn.functional.pad(1000 * sigmas, (clean.shape[2], 0))
    velocity: Tensor = transformer(
        torch.cat([clean, noisy], 2),
        timesteps.repeat_interleave(per_frame, 1),
        embeddings,
        return_dict=False,
    )[0]
    return velocity[:, :, clean.shape[2] :]
