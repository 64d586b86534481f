"""Rolling self-attention keys and values: a window over the latent frames of an endless rollout."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Trim = Literal["before", "after"]


@dataclass(frozen=True)
class WindowConfig:
    """How far a chunk attends, in tokens; the chunk's own count."""

    window: int
    sink: int  # first tokens, never evicted
    chunk: int  # most tokens of one chunk
    trim: Trim = "before"

    @property
    def rows(self) -> int:
        """Tokens that are ever held at once."""
        return self.window + (self.chunk if self.trim == "after" else 0)


class RollingKV:
    """Keys and values of all blocks, oldest first, in two preallocated tensors.

    The rows are a chunk's business, not a forward's: `begin` makes room, every forward in between
    writes the same rows, `commit` keeps them. A chunk that fails is begun again: nothing of it was
    kept. Two meanings of a full window exist:

    - trim "before" (Self-Forcing's local_attn_size, diffusers PR #13681): what falls out is evicted
      as a chunk begins, so that all its forwards see `window` tokens;
    - trim "after" (diffusers PR #13569: append, then overwrite the end): the first forward still
      sees what falls out, and the later ones do not.

    With a window that is full, shapes and addresses no longer change from one step to the next.
    """

    def __init__(  # noqa: PLR0913 - what the tensors are
        self,
        reach: WindowConfig,
        *,
        blocks: int,
        batch: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (blocks, batch, heads, reach.rows, head_dim)
        self.reach = reach
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.raw_sink = torch.empty(
            blocks, batch, heads, reach.sink, head_dim, dtype=dtype, device=device
        )
        self.reset()

    def reset(self) -> None:
        """Remember nothing."""
        self.stored = 0  # tokens of finished chunks
        self._open = 0  # tokens of the current chunk
        self._hidden = 0  # oldest rows that the current forward does not see

    @property
    def bytes(self) -> int:
        """What it occupies, always."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values, self.raw_sink))

    @property
    def seen(self) -> int:
        """Tokens that the next forward attends to, the current chunk's included."""
        return self.stored + self._open - self._hidden

    def begin(self, tokens: int) -> None:
        """Make room for a chunk of `tokens`. Raises ValueError where the window cannot hold it."""
        if tokens > self.reach.chunk or self.reach.sink + tokens > self.reach.window:
            raise ValueError(f"a chunk of {tokens} tokens does not fit {self.reach}")
        coming = tokens if self.reach.trim == "before" else 0
        self._drop(self.stored + coming - self.reach.window)
        self._open, self._hidden = tokens, 0

    def end_forward(self) -> None:
        """A forward is over: from now on the window is what is seen."""
        if self.reach.trim == "after":
            self._hidden = max(0, self.stored + self._open - self.reach.window)

    def commit(self) -> None:
        """Keep the current chunk's rows as they were written last."""
        self.stored += self._open
        self._open = self._hidden = 0

    def write(self, block: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put the chunk's keys and values [B, H, tokens, D] in place; returns all that are seen."""
        end = self.stored + self._open
        self.keys[block, :, :, self.stored : end] = keys
        self.values[block, :, :, self.stored : end] = values
        seen = slice(self._hidden, end)
        return self.keys[block, :, :, seen], self.values[block, :, :, seen]

    def keep_raw_sink(self, block: int, keys: Tensor) -> None:
        """Keep those of the chunk's unrotated keys [B, H, tokens, D] that belong to the sink."""
        count = min(self.reach.sink - self.stored, self._open)
        if count > 0:
            rows = slice(self.stored, self.stored + count)
            self.raw_sink[block, :, :, rows] = keys[:, :, :count]

    def put_sink(self, block: int, keys: Tensor) -> None:
        """Replace the sink's keys [B, H, sink, D]."""
        self.keys[block, :, :, : self.reach.sink] = keys

    def _drop(self, tokens: int) -> None:
        """Evict the oldest after the sink: what stays moves down, in slices that do not overlap."""
        if tokens <= 0:
            return
        start = self.reach.sink
        while start < self.stored - tokens:
            count = min(tokens, self.stored - tokens - start)
            for rows in (self.keys, self.values):
                moved = rows[..., start + tokens : start + tokens + count, :]
                rows[..., start : start + count, :] = moved
            start += count
        self.stored -= tokens
