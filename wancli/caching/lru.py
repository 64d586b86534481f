"""What a transformer made of an input, kept and found again by the input itself.

Shapes: B batch, M tokens of a prompt, H heads, D head size.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


@dataclass(eq=False)
class KV:
    """Keys and values [B, M, H, D] in one block; `mask` [1, 1, 1, M] hides their padding."""

    key: Tensor | None = None
    value: Tensor | None = None
    mask: Tensor | None = None

    def fill(self, key: Tensor, value: Tensor, *, align: int = 1) -> None:
        """Keep them, padded to a multiple of `align` tokens with rows that no query sees."""
        tokens = key.shape[1]
        rows = -tokens % align
        if rows:
            key, value = (pad(x, (0, 0, 0, 0, 0, rows)) for x in (key, value))
            visible = torch.arange(tokens + rows, device=key.device) < tokens
            self.mask = visible[None, None, None]
        self.key, self.value = key, value.contiguous()  # fused projections share their memory


class CacheKey:
    """A tensor as it was when it was read. Held, so that nobody else is given its memory."""

    def __init__(self, tensor: Tensor) -> None:
        unversioned = tensor.is_inference()  # what is written into those goes unseen: keep a copy
        self._tensor = tensor.clone() if unversioned else tensor
        self._version = version(self._tensor)

    def is_same(self, tensor: Tensor) -> bool:
        """Whether it is this very memory, not written to since: no device is waited for."""
        return (
            not tensor.is_inference()
            and tensor.dtype == self._tensor.dtype
            and tensor.is_set_to(self._tensor)
            and version(tensor) == self._version
        )

    def is_equal(self, tensor: Tensor) -> bool:
        """Whether it has these values, whoever's memory it is. The device is waited for."""
        mine = self._tensor
        return (
            version(mine) == self._version
            and (tensor.dtype, tensor.device, tensor.shape) == (mine.dtype, mine.device, mine.shape)
            and torch.equal(tensor, mine)
        )

    def move(self, tensor: Tensor) -> None:
        """Hold this one, which is equal, so that the next time it is the same."""
        if not tensor.is_inference():
            self._tensor, self._version = tensor, version(tensor)


@dataclass(eq=False)
class CacheEntry:
    """What one input came to: what its embedder gave, and keys and values for each attention."""

    sources: list[CacheKey]
    blocks: list[KV]
    embedded: Tensor | None = None

    @property
    def filled(self) -> bool:
        """Whether no projection is needed any more."""
        return all(kv.key is not None for kv in self.blocks)

    @property
    def nbytes(self) -> int:
        """What it occupies."""
        tensors = [self.embedded, *(t for kv in self.blocks for t in (kv.key, kv.value, kv.mask))]
        return sum(t.nbytes for t in tensors if t is not None)


@dataclass(eq=False)
class LRUCache:
    """What one kind of input came to, the one longest unused first."""

    kept: list[CacheEntry] = field(default_factory=list)
    marks: Sequence[object] = ()  # of the weights that made it

    @property
    def nbytes(self) -> int:
        """What it occupies."""
        return sum(kept.nbytes for kept in self.kept)

    def find(self, sources: Sequence[Tensor], blocks: int, marks: Sequence[object]) -> CacheEntry:
        """What these came to; where they, or the weights, are new: empty, to be filled."""
        if marks != self.marks:
            self.trim(0)
            self.marks = marks
        kept = self._known(sources, CacheKey.is_same) or self._known(sources, CacheKey.is_equal)
        if kept is None:
            kept = CacheEntry(
                [CacheKey(tensor) for tensor in sources], [KV() for _ in range(blocks)]
            )
        else:
            self.kept.remove(kept)
            for source, tensor in zip(kept.sources, sources, strict=True):
                source.move(tensor)
        self.kept.append(kept)
        return kept

    def trim(self, most: int) -> None:
        """Drop what has been unused longest."""
        self.kept = self.kept[-most:] if most else []

    def _known(
        self, sources: Sequence[Tensor], same: Callable[[CacheKey, Tensor], bool]
    ) -> CacheEntry | None:
        for kept in self.kept:
            if len(kept.sources) == len(sources) and all(map(same, kept.sources, sources)):
                return kept
        return None


def version(tensor: Tensor) -> int:
    """How often it has been written to."""
    return 0 if tensor.is_inference() else tensor._version


def swap(module: nn.Module, name: str, ours: nn.Module, undo: ExitStack) -> None:
    """Put a submodule of this instance in the place of another, until `undo`."""
    undo.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, ours)
