"""Rolling KV cache of self-attention: a window over the latent frames of an endless rollout."""

from dataclasses import dataclass

import torch
from torch import Tensor

from wancli.catalog.geometry import WindowConfig


@dataclass(eq=False)
class BlockKV:
    """One block's part of a cache: rows of all heads, oldest first."""

    keys: Tensor  # [B, rows, H, D]
    values: Tensor  # [B, rows, H, D]
    raw_sink: Tensor  # the sink's keys before rotation [B, sink or 0 rows, H, D]


class RollingKV:
    """Keys and values of all blocks, oldest first, in two preallocated tensors.

    `begin` makes room for a chunk, every forward of the chunk writes the same rows, `commit` keeps
    them. A chunk that failed can simply begin again: nothing of it was committed. A full window
    can be trimmed in two ways:

    - trim "before" (Self-Forcing's local_attn_size, diffusers PR #13681): rows are evicted as a
      chunk begins, so all of its forwards attend to `window` frames;
    - trim "after" (diffusers PR #13569: append, then overwrite the end): the first forward still
      attends to the rows about to be evicted, later ones do not.

    Once the window is full, shapes and addresses no longer change from step to step.
    """

    def __init__(  # noqa: PLR0913 - the axes of the tensors
        self,
        window: WindowConfig,
        *,
        blocks: int,
        batch: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        moves_sink: bool = False,
    ) -> None:
        """`moves_sink`: the sink's keys are rotated anew as the window moves on."""
        self.window = window
        self._window, self.sink = window.window_tokens, window.sink_tokens

        def empty(rows: int) -> Tensor:
            return torch.empty(blocks, batch, rows, heads, head_dim, dtype=dtype, device=device)

        self.keys, self.values = empty(window.capacity), empty(window.capacity)
        self.raw_sink = empty(self.sink if moves_sink else 0)
        views = zip(self.keys, self.values, self.raw_sink, strict=True)
        self.blocks = [BlockKV(*tensors) for tensors in views]
        self.reset()

    def reset(self) -> None:
        """Empty the cache."""
        self.stored = 0  # tokens of committed chunks
        self.hidden = 0  # oldest rows, which the current forward does not attend to
        self._open = 0  # tokens of the current chunk
        self._shot_sink = self.sink, 0  # first row and number of rows, which are none
        self.sink_frame: int | None = None  # position at which the sink's keys are rotated

    @property
    def nbytes(self) -> int:
        """Allocated bytes; constant."""
        return self.keys.nbytes + self.values.nbytes + self.raw_sink.nbytes

    @property
    def visible(self) -> int:
        """Tokens that the next forward attends to, the current chunk's included."""
        return self.stored + self._open - self.hidden

    def begin(self, tokens: int) -> None:
        """Make room for a chunk of `tokens`. Raises ValueError if it does not fit the window."""
        chunk = self.window.chunk * self.window.tokens_per_frame
        if tokens > chunk or self.sink + tokens > self._window:
            raise ValueError(f"a chunk of {tokens} tokens does not fit {self.window}")
        incoming = tokens if self.window.trim == "before" else 0
        self._evict(self.stored + incoming - self._window)
        self._open, self.hidden = tokens, 0

    def refill(self, tokens: int, *, kept: int) -> None:
        """Make room for `tokens` that take the place of all rows but the first `kept`.

        Raises ValueError if they do not fit.
        """
        if kept + tokens > self._window:
            raise ValueError(f"{kept} and {tokens} tokens do not fit {self.window}")
        self.stored, self.hidden, self._open = kept, 0, tokens

    def end_forward(self) -> None:
        """End a forward; from now on the chunk attends to the window alone."""
        if self.window.trim == "after":
            self.hidden = max(0, self.stored + self._open - self._window)

    def commit(self) -> None:
        """Keep the current chunk's rows as its last forward wrote them."""
        self.stored += self._open
        self._open = self.hidden = 0

    def keep(self, tokens: int) -> None:
        """Keep the first of the `tokens` of the chunk committed last, as many as the sink has.

        They are the sink of a shot (LongLive 2, arXiv:2605.18739), until those of the next one.
        """
        start = max(self.sink, self.stored - tokens)
        self._shot_sink = start, min(self.sink, self.stored - start)

    def _evict(self, tokens: int) -> None:
        """Evict the oldest tokens after the sink, those before the shot's sink first."""
        if tokens <= 0:
            return
        start, count = self._shot_sink
        before = min(tokens, start - self.sink)
        self._drop(self.sink, before)
        self._shot_sink = start - before, count
        self._drop(start - before + count, tokens - before)

    def _drop(self, start: int, tokens: int) -> None:
        """Drop tokens from row `start` on, moving the rest down in disjoint slices."""
        if not tokens:
            return
        while start < self.stored - tokens:
            count = min(tokens, self.stored - tokens - start)
            for rows in (self.keys, self.values):
                moved = rows[:, :, start + tokens : start + tokens + count]
                rows[:, :, start : start + count] = moved
            start += count
        self.stored -= tokens
