"""Prompt K/V: a prompt's part of a Wan transformer, computed once and not in every step. Exact.

Caches keys and values of the prompt and of the image in every block, outputs of the text and image
embedders, rotary tables, and Wan-Animate's whole face branch. Attention processors and submodules
of the instance are swapped; nothing is patched. Inference only: cached tensors have no gradient.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import WanAnimateTransformer3DModel
from diffusers.models.transformers import transformer_wan, transformer_wan_animate
from torch import Tensor, nn

from wancli.caching.lru import LRUCache, swap
from wancli.caching.prompt_attention import (
    AttentionGroup,
    FaceAttention,
    PromptAttention,
    WeightOffloader,
    image_projections,
    text_projections,
)
from wancli.catalog.specs import TEXT_LENGTH
from wancli.catalog.wan import TIMESTEP_ROWS

MAX_PROMPTS = 4  # per transformer: two, each with its negative prompt

STOCK_ROPE = (transformer_wan.WanRotaryPosEmbed, transformer_wan_animate.WanRotaryPosEmbed)
STOCK_FACE = transformer_wan_animate.WanAnimateFaceBlockAttnProcessor
STOCK = (transformer_wan.WanAttnProcessor, transformer_wan_animate.WanAttnProcessor, STOCK_FACE)


@dataclass(eq=False)
class LayerCaches:
    """Caches of one transformer, by kind of input."""

    text: LRUCache = field(default_factory=LRUCache)
    image: LRUCache = field(default_factory=LRUCache)
    motion: LRUCache = field(default_factory=LRUCache)
    face: LRUCache = field(default_factory=LRUCache)

    def __iter__(self) -> Iterator[LRUCache]:
        return iter((self.text, self.image, self.motion, self.face))


class PromptKVCache:
    """Caches of one request's prompts, for each transformer.

    Recomputes when embeddings are replaced or written to, and when projections are replaced (a
    LoRA was loaded) or written to. Merging, scaling or disabling a LoRA, and replacing weights
    through `.data`, go unnoticed: use a new cache. Of each kind of input it keeps the `size` most
    recently used.
    """

    def __init__(self, size: int = MAX_PROMPTS) -> None:
        self.size = size
        self._layers: WeakKeyDictionary[nn.Module, LayerCaches] = WeakKeyDictionary()

    def of(self, transformer: nn.Module) -> LayerCaches:
        """Caches of this transformer."""
        return self._layers.setdefault(transformer, LayerCaches())

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and embeddings in all transformers."""
        return sum(lru.nbytes for layers in self._layers.values() for lru in layers)


class CachedModule(nn.Module):
    """An embedder that runs once per input, and points the attentions to the input's K/V."""

    def __init__(
        self, embedder: nn.Module, lru: LRUCache, attentions: AttentionGroup, size: int, *,
        length: int | None = None,
    ) -> None:  # fmt: skip
        """`length` is the only number of tokens that is accepted."""
        super().__init__()
        self.embedder, self._lru, self._attentions, self._size = embedder, lru, attentions, size
        self._length = length

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, M, D] to the embedder's output [B, M, H*D]."""
        if self._length and tokens.shape[1] != self._length:
            raise ValueError(f"with an image there must be {self._length} text tokens")
        embedded = self.embed(tokens, (tokens,))
        self._lru.trim(self._size)
        return embedded

    def embed(self, tokens: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """The embedder's output for `tokens`, cached by the `inputs` that determine them."""
        group = self._attentions
        entry = self._lru.get(inputs, len(group.slots), group.weight_versions())
        group.use(entry)
        if entry.embedded is None:
            entry.embedded = self.embedder(tokens)
            group.fill(entry.embedded)
        return entry.embedded


class CachedMotionEncoder(CachedModule):
    """Wan-Animate's motion encoder, which gets a face video in batches of frames."""

    def __init__(
        self, embedder: nn.Module, lru: LRUCache, attentions: AttentionGroup, size: int
    ) -> None:
        super().__init__(embedder, lru, attentions, size)
        self._video: list[Tensor] = []

    def forward(self, tokens: Tensor) -> Tensor:
        """Faces [frames, C, H, W] to motion [frames, D]."""
        self._video.append(self.embed(tokens, (tokens,)))
        return self._video[-1]

    def end(self) -> list[Tensor]:
        """Cached motion of the whole video: the same tensors in every forward."""
        video, self._video = self._video, []
        self._lru.trim(self._size * len(video))
        return video


class CachedFaceEncoder(CachedModule):
    """Wan-Animate's face encoder. Its input is a new tensor each time, made of cached motion."""

    def __init__(
        self,
        embedder: nn.Module,
        lru: LRUCache,
        attentions: AttentionGroup,
        size: int,
        *,
        motion: CachedMotionEncoder,
    ) -> None:
        super().__init__(embedder, lru, attentions, size)
        self._end_of_motion = motion.end  # not `motion`: that is the transformer's submodule

    def forward(self, tokens: Tensor) -> Tensor:
        """Motion [B, frames, D] to motion tokens [B, T, N, H*D]."""
        embedded = self.embed(tokens, self._end_of_motion())
        self._lru.trim(self._size)
        return embedded


class CachedRope(nn.Module):
    """Rotary embedding that computes the table of each latent shape once."""

    def __init__(self, rope: nn.Module) -> None:
        super().__init__()
        self.rope = rope
        self._tables: dict[object, tuple[Tensor, Tensor]] = {}

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each [1, L, 1, D], for latents [B, C, F, H, W]."""
        shape = (latents.shape[2:], latents.device)
        if shape not in self._tables:
            self._tables[shape] = self.rope(latents)
        return self._tables[shape]


class UniformTimesteps(nn.Module):
    """Condition embedder for a timestep that is the same for all tokens.

    Returns one row, [B, 1, D] for [B, L, D], which the blocks broadcast. Exact where a product of
    128 rows rounds like one of L rows: on CPUs from 4 rows on (a single row uses another kernel,
    5e-7 off); not measured on GPUs.
    """

    def __init__(self, embedder: nn.Module) -> None:
        super().__init__()
        self.embedder = embedder

    def forward(
        self,
        timestep: Tensor,
        text: Tensor,
        image: Tensor | None = None,
        timestep_seq_len: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Embeddings of the timestep, its projection, and embeddings of text and image."""
        if timestep_seq_len is None:
            time, projected, text, image = self.embedder(timestep, text, image)
            return time, projected, text, image
        rows = timestep.view(-1, timestep_seq_len)[:, :TIMESTEP_ROWS]
        time, projected, text, image = self.embedder(rows.flatten(), text, image, rows.shape[1])
        return time[:, :1], projected[:, :1], text, image


@contextmanager
def prompt_kv(
    transformer: Any,
    cache: PromptKVCache,
    *,
    align: int = 1,
    uniform_timesteps: bool = False,
    offload_to: torch.device | None = None,
) -> Iterator[Sequence[WeightOffloader]]:
    """Let the transformer compute each prompt once; restored on exit, even after an error.

    `align` pads the cached tokens to a multiple, masked: the same in float64, a rounding (3e-7) off
    in float32, whose sums are then taken in another order. `uniform_timesteps` promises that all
    tokens share a timestep, of which TI2V-5B otherwise gets one for each. While all keys and values
    are cached, the weights that project them are kept on `offload_to`; the offloaders that are
    yielded tell how many bytes that frees. Not to be combined with other offloading.
    """
    with ExitStack() as undo:
        text, image, face = _swap_attention(transformer, align, undo)
        offloaders = []
        if offload_to is not None:
            for group in (text, image, face):
                group.offloader = WeightOffloader(offload_to)
                undo.callback(group.offloader.restore)
                offloaders.append(group.offloader)
        layers, size, embedder = cache.of(transformer), cache.size, transformer.condition_embedder
        length = TEXT_LENGTH if image.slots else None  # diffusers assumes it beside an image
        cached = CachedModule(embedder.text_embedder, layers.text, text, size, length=length)
        swap(embedder, "text_embedder", cached, undo)
        if embedder.image_embedder is not None:
            cached = CachedModule(embedder.image_embedder, layers.image, image, size)
            swap(embedder, "image_embedder", cached, undo)
        if isinstance(transformer, WanAnimateTransformer3DModel):
            no_attention = AttentionGroup(text_projections)
            motion = CachedMotionEncoder(
                transformer.motion_encoder, layers.motion, no_attention, size
            )
            swap(transformer, "motion_encoder", motion, undo)
            cached = CachedFaceEncoder(
                transformer.face_encoder, layers.face, face, size, motion=motion
            )
            swap(transformer, "face_encoder", cached, undo)
        if type(transformer.rope) in STOCK_ROPE:
            swap(transformer, "rope", CachedRope(transformer.rope), undo)
        if uniform_timesteps:
            swap(transformer, "condition_embedder", UniformTimesteps(embedder), undo)
        yield offloaders


def _swap_attention(
    transformer: Any, align: int, undo: ExitStack
) -> tuple[AttentionGroup, AttentionGroup, AttentionGroup]:
    """Replace the transformer's cross-attention; the groups that read text, image and face."""
    text, image, face = (
        AttentionGroup(of) for of in (text_projections, image_projections, text_projections)
    )
    for name, stock in transformer.attn_processors.items():  # blocks.3.attn2.processor
        attn = transformer.get_submodule(name.removesuffix(".processor"))
        if not attn.is_cross_attention:
            continue
        if type(stock) not in STOCK:
            raise RuntimeError(
                "prompt_kv must be entered once, and before anything else replaces diffusers' "
                f"own cross-attention: {name} is {type(stock).__name__}"
            )
        processor: Any
        if type(stock) is STOCK_FACE:
            processor = FaceAttention(stock)
            face.add(attn, processor.face)
        else:
            processor = PromptAttention(stock, align)
            ahead = _is_compiled(transformer)  # else a block's weights may be offloaded by now
            text.add(attn, processor.text, processor.fill_text if ahead else None)
            if attn.add_k_proj is not None:
                image.add(attn, processor.image, processor.fill_image if ahead else None)
        undo.callback(attn.set_processor, stock)
        attn.set_processor(processor)
    return text, image, face


def _is_compiled(transformer: Any) -> bool:
    """Whether the blocks are: filling caches in them would take a graph of its own."""
    return transformer.blocks[0]._compiled_call_impl is not None
