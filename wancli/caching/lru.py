"""An LRU cache of keys and values, looked up by the input tensors that they were computed from.

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
    """Keys and values [B, M, H, D] of one block; `mask` [1, 1, 1, M] hides their padding."""

    key: Tensor | None = None
    value: Tensor | None = None
    mask: Tensor | None = None

    def fill(self, key: Tensor, value: Tensor, *, align: int = 1) -> None:
        """Store them, padded to a multiple of `align` tokens with masked rows."""
        tokens = key.shape[1]
        rows = -tokens % align
        if rows:
            key, value = (pad(x, (0, 0, 0, 0, 0, rows)) for x in (key, value))
            visible = torch.arange(tokens + rows, device=key.device) < tokens
            self.mask = visible[None, None, None]
        self.key, self.value = key, value.contiguous()  # fused projections share their memory


class CacheKey:
    """A tensor and its version when it was read. Holding it keeps its memory from being reused."""

    def __init__(self, tensor: Tensor) -> None:
        unversioned = tensor.is_inference()  # writes to those cannot be noticed: keep a copy
        self._tensor = tensor.clone() if unversioned else tensor
        self._version = version(self._tensor)

    def is_same(self, tensor: Tensor) -> bool:
        """Whether it is this very memory, not written to since. Does not synchronize the device."""
        return (
            not tensor.is_inference()
            and tensor.dtype == self._tensor.dtype
            and tensor.is_set_to(self._tensor)
            and version(tensor) == self._version
        )

    def is_equal(self, tensor: Tensor) -> bool:
        """Whether it has equal values in any memory. Synchronizes the device."""
        mine = self._tensor
        return (
            version(mine) == self._version
            and (tensor.dtype, tensor.device, tensor.shape) == (mine.dtype, mine.device, mine.shape)
            and torch.equal(tensor, mine)
        )

    def move(self, tensor: Tensor) -> None:
        """Hold this equal tensor instead, so that next time `is_same` suffices."""
        if not tensor.is_inference():
            self._tensor, self._version = tensor, version(tensor)


@dataclass(eq=False)
class CacheEntry:
    """The embedder's output for one input, and its keys and values in each attention."""

    keys: list[CacheKey]
    blocks: list[KV]
    embedded: Tensor | None = None

    @property
    def filled(self) -> bool:
        """Whether the projections are no longer needed."""
        return all(kv.key is not None for kv in self.blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        tensors = [self.embedded, *(t for kv in self.blocks for t in (kv.key, kv.value, kv.mask))]
        return sum(t.nbytes for t in tensors if t is not None)


@dataclass(eq=False)
class LRUCache:
    """Entries of one kind of input, least recently used first."""

    entries: list[CacheEntry] = field(default_factory=list)
    weight_versions: Sequence[object] = ()  # of the weights that computed the entries

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return sum(entry.nbytes for entry in self.entries)

    def get(
        self, inputs: Sequence[Tensor], blocks: int, weight_versions: Sequence[object]
    ) -> CacheEntry:
        """The entry of these inputs; a new, empty one if they or the weights have changed."""
        if weight_versions != self.weight_versions:
            self.trim(0)
            self.weight_versions = weight_versions
        entry = self._find(inputs, CacheKey.is_same) or self._find(inputs, CacheKey.is_equal)
        if entry is None:
            keys = [CacheKey(tensor) for tensor in inputs]
            entry = CacheEntry(keys, [KV() for _ in range(blocks)])
        else:
            self.entries.remove(entry)
            for key, tensor in zip(entry.keys, inputs, strict=True):
                key.move(tensor)
        self.entries.append(entry)
        return entry

    def trim(self, size: int) -> None:
        """Evict the least recently used entries, down to `size`."""
        self.entries = self.entries[-size:] if size else []

    def _find(
        self, inputs: Sequence[Tensor], matches: Callable[[CacheKey, Tensor], bool]
    ) -> CacheEntry | None:
        for entry in self.entries:
            if len(entry.keys) == len(inputs) and all(map(matches, entry.keys, inputs)):
                return entry
        return None


def version(tensor: Tensor) -> int:
    """Autograd's count of writes to a tensor; 0 for inference tensors, which have none."""
    return 0 if tensor.is_inference() else tensor._version


def swap(module: nn.Module, name: str, replacement: nn.Module, undo: ExitStack) -> None:
    """Replace a submodule of this instance until `undo` closes."""
    undo.callback(setattr, module, name, getattr(module, name))
    setattr(module, name, replacement)
