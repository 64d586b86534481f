"""Wan cross-attention with cached keys and values, and offloading of the projections.

B batch, L tokens of the video, M tokens of the prompt, H heads, D head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from wancli.caching.attention import attend, by_head, project_out
from wancli.caching.lru import KV, CacheEntry, version
from wancli.catalog.specs import TEXT_LENGTH

Projections = tuple[nn.Module, ...]


@dataclass(eq=False)
class KVSlot:
    """The keys and values that an attention reads in the current forward.

    A block's index instead of a slot would make `torch.compile` build a graph for each block.
    """

    kv: KV = field(default_factory=KV)


class CachedAttention:
    """Base of attention processors that use the stock processor's kernel."""

    def __init__(self, stock: Any) -> None:
        backend = stock._attention_backend
        self._backend = backend.value if backend else "native"

    def attend(self, query: Tensor, kv: KV) -> Tensor:
        """Attention of queries [B, L, H, D] over cached keys and values: [B, L, H*D]."""
        if kv.key is None or kv.value is None:
            raise RuntimeError("fill the keys and values first")
        return attend(query, kv.key, kv.value, self._backend, mask=kv.mask).flatten(2)


class PromptAttention(CachedAttention):
    """Cross-attention to the text, and to the image of image-to-video models."""

    def __init__(self, stock: Any, align: int) -> None:
        super().__init__(stock)
        self.text, self.image, self._align = KVSlot(), KVSlot(), align

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        rotary_emb: None = None,
    ) -> Tensor:
        """[B, L, H*D] attends to [B, image + text, H*D]. No mask, no rotary embedding."""
        has_image = attn.add_k_proj is not None
        images = encoder_hidden_states.shape[1] - TEXT_LENGTH if has_image else 0
        if has_image and images <= 0:
            raise ValueError("this transformer attends to an image, but there is none")
        if self.text.kv.key is None:
            self.fill_text(attn, encoder_hidden_states[:, images:])
        query = by_head(attn, attn.norm_q(attn.to_q(hidden_states)))
        mixed = self.attend(query, self.text.kv)
        if has_image:
            if self.image.kv.key is None:
                self.fill_image(attn, encoder_hidden_states[:, :images])
            mixed = mixed + self.attend(query, self.image.kv)
        return project_out(attn, mixed)

    def fill_text(self, attn: Any, tokens: Tensor) -> None:
        """Compute the keys and values of text tokens [B, M, H*D]."""
        key, value = _keys_values(text_projections(attn), tokens)
        key, value = by_head(attn, attn.norm_k(key)), by_head(attn, value)
        self.text.kv.fill(key, value, align=self._align)

    def fill_image(self, attn: Any, tokens: Tensor) -> None:
        """Compute the keys and values of image tokens [B, M, H*D]."""
        key, value = _keys_values(image_projections(attn), tokens)
        key, value = by_head(attn, attn.norm_added_k(key)), by_head(attn, value)
        self.image.kv.fill(key, value, align=self._align)


class FaceAttention(CachedAttention):
    """Wan-Animate's face attention: each latent frame attends to that frame of the face video."""

    def __init__(self, stock: Any) -> None:
        super().__init__(stock)
        self.face = KVSlot()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
    ) -> Tensor:
        """[B, L, H*D] attends to [B, T, N, H*D]: N motion tokens for each of T latent frames."""
        batch, frames, tokens, _ = encoder_hidden_states.shape
        kv = self.face.kv
        if kv.key is None:
            motion = attn.pre_norm_kv(encoder_hidden_states).flatten(1, 2)
            key, value = (
                x.view(batch, frames, tokens, attn.heads, -1)
                for x in _keys_values(text_projections(attn), motion)
            )
            kv.fill(attn.norm_k(key).flatten(0, 1), value.flatten(0, 1))
        query = attn.norm_q(by_head(attn, attn.to_q(attn.pre_norm_q(hidden_states))))
        query = query.reshape(batch * frames, -1, *query.shape[2:])  # [B*T, L/T, H, D]
        mixed = self.attend(query, kv)
        out: Tensor = attn.to_out(mixed.reshape(batch, -1, mixed.shape[-1]))
        return out


def text_projections(attn: Any) -> Projections:
    """Key and value projections of the text, or of the face's motion."""
    return (attn.to_kv,) if attn.fused_projections else (attn.to_k, attn.to_v)


def image_projections(attn: Any) -> Projections:
    """Key and value projections of the image."""
    return (attn.to_added_kv,) if attn.fused_projections else (attn.add_k_proj, attn.add_v_proj)


class WeightOffloader:
    """Keeps unused weights on another device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._offloaded: list[tuple[nn.Parameter, Tensor, torch.device]] = []

    @property
    def nbytes(self) -> int:
        """Bytes currently freed."""
        return sum(data.nbytes for _, data, _ in self._offloaded)

    def offload(self, modules: Sequence[nn.Module]) -> None:
        """Move the modules' weights off their device, unless already done."""
        if not self._offloaded:
            for weight in (weight for module in modules for weight in module.parameters()):
                self._offloaded.append((weight, weight.data.to(self._device), weight.device))
                weight.data = weight.data.new_empty(0)

    def restore(self) -> None:
        """Move the weights back. After an error the others are whole, but on the other device."""
        offloaded, self._offloaded = self._offloaded, []
        try:
            while offloaded:
                weight, data, device = offloaded[-1]
                weight.data = data.to(device)
                offloaded.pop()
        finally:
            for weight, data, _ in offloaded:
                weight.data = data


@dataclass(eq=False)
class AttentionGroup:
    """The attentions that read one kind of input, their slots, and their projections."""

    projections: Callable[[Any], Projections]
    offloader: WeightOffloader | None = None
    attentions: list[Any] = field(default_factory=list)
    slots: list[KVSlot] = field(default_factory=list)
    fills: list[Callable[[Any, Tensor], None]] = field(default_factory=list)

    def add(
        self, attn: Any, slot: KVSlot, fill: Callable[[Any, Tensor], None] | None = None
    ) -> None:
        """Add an attention; `fill` computes the slot's keys and values before any forward."""
        self.attentions.append(attn)
        self.slots.append(slot)
        if fill:
            self.fills.append(fill)

    def fill(self, tokens: Tensor) -> None:
        """Compute the keys and values of all slots from the embedder's output [B, M, H*D]."""
        for attn, fill in zip(self.attentions, self.fills, strict=False):
            fill(attn, tokens)

    def weight_versions(self) -> list[object]:
        """Changes when a projection is replaced, or written to where autograd sees it."""
        return [
            (ref(module), module.weight.dtype, version(module.weight)) for module in self._modules()
        ]

    def use(self, entry: CacheEntry) -> None:
        """Point every slot to the entry, and bring back the projections if it has to be filled."""
        for slot, kv in zip(self.slots, entry.blocks, strict=True):
            slot.kv = kv
        if self.offloader and entry.filled:
            self.offloader.offload(self._modules())
        elif self.offloader:
            self.offloader.restore()

    def _modules(self) -> list[Any]:
        return [module for attn in self.attentions for module in self.projections(attn)]


def _keys_values(projections: Projections, tokens: Tensor) -> tuple[Tensor, Tensor]:
    if len(projections) == 1:
        key, value = projections[0](tokens).chunk(2, dim=-1)
    else:
        key, value = (projection(tokens) for projection in projections)
    return key, value
