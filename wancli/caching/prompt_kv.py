"""What a prompt comes to inside a Wan transformer, computed once instead of in every step: exact.

The prompt's and the image's keys and values in every block, the text and image embedders' outputs,
the rotary tables, and Wan-Animate's whole face branch. Processors and submodules of the instance
are exchanged, nothing is patched. Inference only: of what is kept there is no gradient.
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

KEPT = 4  # prompts in one transformer: two, each with its negative one
TABLES = 4  # latent shapes


STOCK_ROPE = (transformer_wan.WanRotaryPosEmbed, transformer_wan_animate.WanRotaryPosEmbed)
STOCK_FACE = transformer_wan_animate.WanAnimateFaceBlockAttnProcessor
STOCK = (transformer_wan.WanAttnProcessor, transformer_wan_animate.WanAttnProcessor, STOCK_FACE)


@dataclass(eq=False)
class LayerCaches:
    """What one transformer knows, by kind of input."""

    text: LRUCache = field(default_factory=LRUCache)
    image: LRUCache = field(default_factory=LRUCache)
    motion: LRUCache = field(default_factory=LRUCache)
    face: LRUCache = field(default_factory=LRUCache)

    @property
    def nbytes(self) -> int:
        """Keys, values and embeddings."""
        return sum(slots.nbytes for slots in (self.text, self.image, self.motion, self.face))


class PromptKVCache:
    """What the prompts of one request came to, inside each transformer.

    It notices other embeddings, embeddings that were written to, other projections (a LoRA was
    loaded), and projections that were written to. It does not notice a LoRA that is merged, scaled
    or switched off, nor weights replaced through `.data`: call `clear`. Of more than `keep` inputs
    of one kind it forgets the one longest unused.
    """

    def __init__(self, keep: int = KEPT) -> None:
        self.keep = keep
        self._known: WeakKeyDictionary[nn.Module, LayerCaches] = WeakKeyDictionary()

    def of(self, transformer: nn.Module) -> LayerCaches:
        """What this transformer knows."""
        return self._known.setdefault(transformer, LayerCaches())

    @property
    def nbytes(self) -> int:
        """Keys, values and embeddings, of all transformers."""
        return sum(known.nbytes for known in self._known.values())

    def clear(self) -> None:
        """Know nothing, also while in use."""
        for known in self._known.values():
            for slots in (known.text, known.image, known.motion, known.face):
                slots.trim(0)


class CachedModule(nn.Module):
    """An embedder that is asked once for each input, and tells the readers which one it is."""

    def __init__(
        self, embedder: nn.Module, slots: LRUCache, readers: AttentionGroup, keep: int
    ) -> None:
        super().__init__()
        self.embedder, self._slots, self._readers, self._keep = embedder, slots, readers, keep

    def forward(self, tokens: Tensor) -> Tensor:
        """What the embedder gives for them."""
        embedded = self.recall(tokens, (tokens,))
        self._slots.trim(self._keep)
        return embedded

    def recall(self, tokens: Tensor, sources: Sequence[Tensor]) -> Tensor:
        """What the embedder gives for `tokens`, which the sources determine."""
        kept = self._slots.find(sources, len(self._readers.seats), self._readers.marks())
        self._readers.read(kept)
        if kept.embedded is None:
            kept.embedded = self.embedder(tokens)
        return kept.embedded


class CachedTextEmbedder(CachedModule):
    """The text embedder. Before an image, diffusers takes it that there are 512 tokens."""

    def __init__(
        self,
        embedder: nn.Module,
        slots: LRUCache,
        readers: AttentionGroup,
        keep: int,
        *,
        pictured: bool,
    ) -> None:
        super().__init__(embedder, slots, readers, keep)
        self._pictured = pictured

    def forward(self, tokens: Tensor) -> Tensor:
        """Text [B, M, H*D] of the text encoder's [B, M, D]."""
        if self._pictured and tokens.shape[1] != TEXT_LENGTH:
            raise ValueError(f"beside an image there are {TEXT_LENGTH} text tokens")
        return super().forward(tokens)


class CachedMotionEncoder(CachedModule):
    """Wan-Animate's motion encoder. It is shown a face video in batches of frames."""

    def __init__(
        self, embedder: nn.Module, slots: LRUCache, readers: AttentionGroup, keep: int
    ) -> None:
        super().__init__(embedder, slots, readers, keep)
        self._video: list[Tensor] = []

    def forward(self, tokens: Tensor) -> Tensor:
        """Motion [frames, D] of faces [frames, C, H, W]."""
        self._video.append(self.recall(tokens, (tokens,)))
        return self._video[-1]

    def end(self) -> list[Tensor]:
        """The motion of the whole video, as it is kept: the same tensors in every forward."""
        video, self._video = self._video, []
        self._slots.trim(self._keep * len(video))
        return video


class CachedFaceEncoder(CachedModule):
    """Wan-Animate's face encoder. Its input is always new, but what that is made of is not."""

    def __init__(
        self,
        embedder: nn.Module,
        slots: LRUCache,
        readers: AttentionGroup,
        keep: int,
        *,
        motion: CachedMotionEncoder,
    ) -> None:
        super().__init__(embedder, slots, readers, keep)
        self._end_of_motion = motion.end  # not `motion`: that is the transformer's submodule

    def forward(self, tokens: Tensor) -> Tensor:
        """Motion tokens [B, T, N, H*D] of the motion [B, frames, D]."""
        embedded = self.recall(tokens, self._end_of_motion())
        self._slots.trim(self._keep)
        return embedded


class CachedRope(nn.Module):
    """The rotary table of every latent shape, made once."""

    def __init__(self, rope: nn.Module) -> None:
        super().__init__()
        self.rope = rope
        self._tables: dict[object, tuple[Tensor, Tensor]] = {}

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each [1, L, 1, D], of latents [B, C, F, H, W]."""
        shape = (latents.shape[2:], latents.device)
        if shape not in self._tables:
            if len(self._tables) == TABLES:
                self._tables.clear()
            self._tables[shape] = self.rope(latents)
        return self._tables[shape]


class UniformTimesteps(nn.Module):
    """The condition embedder, told one timestep for all tokens instead of one for each.

    One row is given back, [B, 1, D] for [B, L, D]: the blocks' arithmetic spreads it. It is exact
    where a product of 128 rows is rounded as one of L rows is: on a CPU from 4 rows on; on a GPU
    nobody has measured it.
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
        """Embedded timestep, its projection, the embedded text, and the image's."""
        if timestep_seq_len is None:
            time, projected, text, image = self.embedder(timestep, text, image)
            return time, projected, text, image
        rows = timestep.view(-1, timestep_seq_len)[:, :TIMESTEP_ROWS]
        time, projected, text, image = self.embedder(rows.flatten(), text, image, rows.shape[1])
        return time[:, :1], projected[:, :1], text, image


@contextmanager
def prompt_kv(
    transformer: Any,
    memory: PromptKVCache,
    *,
    align: int = 1,
    uniform_timesteps: bool = False,
    park: torch.device | None = None,
) -> Iterator[Sequence[WeightOffloader]]:
    """Let the transformer compute a prompt once; left, it is as it was, error or not.

    `align` pads the stored tokens to a multiple, out of the queries' sight: the same in float64,
    and a rounding apart in float32 (3e-7), because sums are then taken in another order.
    `uniform_timesteps` says that all tokens have one timestep, which TI2V-5B is otherwise told for
    each of them. On `park` the weights that project keys and values wait while those are all known;
    the parkings that are yielded know how many bytes that frees. Not together with offloading.
    """
    with ExitStack() as undo:
        text, image, face = _take_attention(transformer, align, undo)
        parkings = []
        for readers in (text, image, face):
            if park is not None:
                readers.parking = WeightOffloader(park)
                undo.callback(readers.parking.fetch)
                parkings.append(readers.parking)
        known, keep, embedder = memory.of(transformer), memory.keep, transformer.condition_embedder
        ours: CachedModule = CachedTextEmbedder(
            embedder.text_embedder, known.text, text, keep, pictured=bool(image.seats)
        )
        swap(embedder, "text_embedder", ours, undo)
        if embedder.image_embedder is not None:
            ours = CachedModule(embedder.image_embedder, known.image, image, keep)
            swap(embedder, "image_embedder", ours, undo)
        if isinstance(transformer, WanAnimateTransformer3DModel):
            nobody = AttentionGroup(text_projections)
            motion = CachedMotionEncoder(transformer.motion_encoder, known.motion, nobody, keep)
            swap(transformer, "motion_encoder", motion, undo)
            ours = CachedFaceEncoder(
                transformer.face_encoder, known.face, face, keep, motion=motion
            )
            swap(transformer, "face_encoder", ours, undo)
        if type(transformer.rope) in STOCK_ROPE:
            swap(transformer, "rope", CachedRope(transformer.rope), undo)
        if uniform_timesteps:
            swap(transformer, "condition_embedder", UniformTimesteps(embedder), undo)
        yield parkings


def _take_attention(
    transformer: Any, align: int, undo: ExitStack
) -> tuple[AttentionGroup, AttentionGroup, AttentionGroup]:
    """Readers of text, image and face, in the place of the transformer's cross-attention."""
    text, image, face = (
        AttentionGroup(make) for make in (text_projections, image_projections, text_projections)
    )
    for name, stock in transformer.attn_processors.items():  # blocks.3.attn2.processor
        attn = transformer.get_submodule(name.removesuffix(".processor"))
        if not attn.is_cross_attention:
            continue
        if type(stock) not in STOCK:
            raise RuntimeError(
                f"prompt_kv is entered once, and before what else takes the place of diffusers' "
                f"own cross-attention: {name} is {type(stock).__name__}"
            )
        ours: Any
        if type(stock) is STOCK_FACE:
            ours = FaceAttention(stock)
            face.add(attn, ours.face)
        else:
            ours = PromptAttention(stock, align)
            text.add(attn, ours.text)
            if attn.add_k_proj is not None:
                image.add(attn, ours.image)
        undo.callback(attn.set_processor, stock)
        attn.set_processor(ours)
    return text, image, face
