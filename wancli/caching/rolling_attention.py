"""Self-attention over a rolling KV cache, through diffusers' own seam: `set_attn_processor`.

Nothing in a block depends on its number, on the branch or on the chunk but the tensors that it is
handed and two integers: `torch.compile` makes one graph of all blocks.

Shapes: B batch, L tokens of this forward, M visible tokens, H heads, D head size.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wancli.caching.attention import attend, project, project_out
from wancli.caching.lru import swap
from wancli.caching.rolling_kv import BlockKV, RollingKV

ROPE_THETA = 10_000.0  # in every Wan


@dataclass(frozen=True)
class RotaryTable:
    """Rotary factors of L tokens, as complex numbers and the same as real ones."""

    factors: Tensor  # unit complex numbers [L, 1, D / 2]
    cos: Tensor  # [L, 1, D], each twice
    sin: Tensor  # [L, 1, D], of each pair -sin, sin


@dataclass(frozen=True)
class ChunkPosition:
    """Where a chunk's tokens are, in time and in the cache."""

    table: RotaryTable
    start: int  # row of the first token
    first_visible: int  # row


class RolloutState:
    """State of a rollout that one transformer's modules share; only the denoiser writes it."""

    def __init__(self) -> None:
        self.kv: RollingKV | None = None  # of the branch (cond or uncond) of the next forward
        self.first_frame = 0  # latent frame at which the current chunk begins
        self.timestep: float | None = 0.0  # of the next forward; None: tokens have their own
        self.attentions: Sequence[RollingAttention] = ()

    def use(self, kv: RollingKV) -> None:
        """Let the next forward attend to this cache."""
        self.kv = kv
        for attention, rows in zip(self.attentions, kv.blocks, strict=True):
            attention.kv = rows


class RollingAttention:
    """Wan self-attention of one chunk over the window of a rollout."""

    def __init__(self, backend: str) -> None:
        self.kv: BlockKV | None = None  # of the next forward
        self.backend = backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        """[B, L, H*D] attends to the M visible tokens; `rotary_emb` is `RollingRope`'s."""
        kv, position = self.kv, rotary_emb
        if kv is None or not isinstance(position, ChunkPosition):
            raise RuntimeError("enter rolling self-attention through `use_kv_cache`")
        query, key, value = project(attn, hidden_states)
        start, end = position.start, position.start + key.shape[1]
        sink = min(kv.raw_sink.shape[1], end) - start  # the chunk's tokens that belong to it
        if sink > 0:
            kv.raw_sink[:, start : start + sink] = key[:, :sink]
        kv.keys[:, start:end] = rotate(key, position.table)
        kv.values[:, start:end] = value
        visible = slice(position.first_visible, end)
        query = rotate(query, position.table)
        mixed = attend(query, kv.keys[:, visible], kv.values[:, visible], self.backend)
        return project_out(attn, mixed.flatten(2))


class RollingRope(nn.Module):
    """The transformer's rotary embedding (RoFormer, arXiv:2104.09864) at any latent frame.

    diffusers' table ends at 1024 positions; this one computes angles from integer positions in
    float64. A token's temporal position is its latent frame's number. The sink, if the cache keeps
    its unrotated keys, is moved along just before the window: attention depends on differences of
    positions alone, so that this is the same as numbering the window's frames from 0.
    """

    def __init__(self, rope: Any, state: RolloutState) -> None:
        super().__init__()
        self.state, self._patch = state, rope.patch_size
        self._sizes = (rope.t_dim, rope.h_dim, rope.w_dim)
        self._tables: dict[Any, RotaryTable] = {}  # of a few chunks: later ones have others

    def forward(self, latents: Tensor) -> ChunkPosition:
        """The position of latents [B, C, F, H, W] that begin at `state.first_frame`."""
        state, kv = self.state, self.state.kv
        if kv is None:
            raise RuntimeError("set state.kv before a forward")
        time, height, width = (
            size // patch for size, patch in zip(latents.shape[2:], self._patch, strict=True)
        )
        first, per_frame = state.first_frame // self._patch[0], height * width
        if kv.blocks[0].raw_sink.shape[1]:
            self._move_sink(kv, first + time - kv.visible // per_frame, (height, width), latents)
        table = self._table(first, (time, height, width), latents)
        return ChunkPosition(table, kv.stored, kv.hidden)

    def _move_sink(self, kv: RollingKV, frame: int, grid: tuple[int, int], latents: Tensor) -> None:
        """Rotate the sink's keys to begin at `frame`, unless they do already."""
        if kv.sink_frame not in (None, frame):
            height, width = grid
            table = self._table(frame, (kv.sink // (height * width), height, width), latents)
            for block in kv.blocks:
                block.keys[:, : kv.sink] = rotate(block.raw_sink, table)
        kv.sink_frame = frame

    def _table(self, first: int, sizes: tuple[int, int, int], like: Tensor) -> RotaryTable:
        key = (first, sizes, like.device, like.dtype)
        if key not in self._tables:
            if len(self._tables) > 8:  # enough for a few chunks
                self._tables.clear()
            device = _wide_device(like.device)
            angles = self._angles(first, sizes, device)
            wide = like.dtype == torch.float64
            cos, sin = (
                x.to(like.dtype if wide else torch.float32).to(like.device)
                for x in (angles.cos(), angles.sin())
            )
            self._tables[key] = RotaryTable(
                torch.complex(cos, sin),
                cos.repeat_interleave(2, -1),
                torch.stack((-sin, sin), -1).flatten(-2),
            )
        return self._tables[key]

    def _angles(self, first: int, sizes: tuple[int, int, int], device: torch.device) -> Tensor:
        """[frames * height * width, 1, D / 2], float64: of each axis, then side by side."""
        axes = []
        for axis, (start, count, channels) in enumerate(
            zip((first, 0, 0), sizes, self._sizes, strict=True)
        ):
            steps = torch.arange(0, channels, 2, dtype=torch.float64, device=device)
            rates = ROPE_THETA ** (-steps / channels)
            positions = torch.arange(start, start + count, dtype=torch.float64, device=device)
            view = [1, 1, 1, channels // 2]
            view[axis] = count
            axes.append(torch.outer(positions, rates).view(view).expand(*sizes, -1))
        return torch.cat(axes, -1).flatten(0, 2)[:, None]


class ExactTimesteps(nn.Module):
    """Sinusoidal timestep embedding in float64, as in Wan's own code; diffusers' is 4e-5 off."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, timesteps: Tensor) -> Tensor:
        """[N] to [N, channels], in the timesteps' dtype."""
        half, device = self.channels // 2, _wide_device(timesteps.device)
        steps = torch.arange(half, dtype=torch.float64, device=device)
        angles = timesteps.to(device).double()[:, None] * 10_000.0 ** (-steps / half)
        return torch.cat([angles.cos(), angles.sin()], -1).to(timesteps)


class OncePerTimestep(nn.Module):
    """A module that runs once per timestep, or in each forward whose tokens have their own."""

    def __init__(self, module: nn.Module, state: RolloutState) -> None:
        super().__init__()
        self.module, self.state = module, state
        self._outputs: dict[float, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """The module's output for the state's timestep."""
        timestep = self.state.timestep
        if timestep is None:
            return self._run(x)
        if timestep not in self._outputs:
            self._outputs[timestep] = self._run(x)
        return self._outputs[timestep]

    def _run(self, x: Tensor) -> Tensor:
        output: Tensor = self.module(x)
        return output


@contextmanager
def use_kv_cache(transformer: Any, *, backend: str = "native") -> Iterator[RolloutState]:
    """Let the transformer attend to the state's cache; restored on exit, even after an error.

    Swaps self-attention processors, and the instance's rotary and timestep embeddings. Prompts are
    cached by `prompt_kv`, entered inside. `backend` as in `attend`.
    """
    embedder, state = transformer.condition_embedder, RolloutState()
    state.attentions = [RollingAttention(backend) for _ in transformer.blocks]
    with ExitStack() as undo:
        for block, attention in zip(transformer.blocks, state.attentions, strict=True):
            undo.callback(block.attn1.set_processor, block.attn1.processor)
            block.attn1.set_processor(attention)
        swap(transformer, "rope", RollingRope(transformer.rope, state), undo)
        timesteps = ExactTimesteps(embedder.timesteps_proj.num_channels)
        for name, module in (
            ("timesteps_proj", timesteps),
            ("time_embedder", embedder.time_embedder),
            ("time_proj", embedder.time_proj),
        ):
            swap(embedder, name, OncePerTimestep(module, state), undo)
        yield state


def rotate(x: Tensor, table: RotaryTable) -> Tensor:
    """Rotate each pair of channels of [B, L, H, D]; both ways give the same bits."""
    way = rotate_real if torch.compiler.is_compiling() else rotate_complex
    return way(x, table)


def rotate_real(x: Tensor, table: RotaryTable) -> Tensor:
    """`rotate` in real numbers, which torch.compile fuses with what is around it."""
    wide = _wide(x)
    swapped = wide.reshape(*x.shape[:-1], -1, 2).flip(-1).flatten(-2)
    return (wide * table.cos + swapped * table.sin).to(x.dtype)


def rotate_complex(x: Tensor, table: RotaryTable) -> Tensor:
    """`rotate` by one complex product."""
    pairs = torch.view_as_complex(_wide(x).reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table.factors).flatten(-2).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _wide_device(device: torch.device) -> torch.device:
    """The device itself, if it has float64."""
    return torch.device("cpu") if device.type == "mps" else device
