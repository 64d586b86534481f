"""Attention with memory, through diffusers' own seam: `set_attn_processor`.

Shapes: B batch, L tokens of this forward, M tokens remembered, H heads, D head size.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from wancli.caching.lru import swap
from wancli.caching.rolling_kv import RollingKV
from wancli.config.settings import RopePolicy

ROPE_THETA = 10_000.0  # in every Wan


@dataclass
class RolloutState:
    """What one transformer remembers of a rollout; the denoiser alone sets it.

    `kv` is that of the branch (cond or uncond) that the next forward computes.
    """

    rope: RopePolicy = "absolute"
    kv: RollingKV | None = None
    first_frame: int = 0  # latent frame at which the current chunk starts
    timestep: float = 0.0  # of the next forward


class RollingAttention:
    """Wan self-attention of one chunk over the window of a rollout."""

    def __init__(self, block: int, memory: RolloutState) -> None:
        self.block, self.memory = block, memory

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        """[B, L, H*D] attends to the M tokens in reach; `rotary_emb` is `RollingRope`'s."""
        kv, turns = self.memory.kv, rotary_emb
        if kv is None or not isinstance(turns, RotaryFactors):
            raise RuntimeError("self-attention with memory is entered through `use_kv_cache`")
        query, key, value = _projected(attn, hidden_states)
        query, key = by_head(attn, attn.norm_q(query)), by_head(attn, attn.norm_k(key))
        value = by_head(attn, value)
        query = rotate(query, turns.query)
        if turns.window is not None:  # keys are remembered unrotated
            key, value = kv.write(self.block, key, value)
            key = rotate(key, turns.window)
        else:
            if self.memory.rope == "sink":
                kv.keep_raw_sink(self.block, key)
            rotated = rotate(key, turns.query)
            if turns.sink is not None:
                kv.put_sink(self.block, rotate(kv.raw_sink[self.block], turns.sink))
            key, value = kv.write(self.block, rotated, value)
        return attend(attn, query, key, value)


@dataclass(frozen=True)
class RotaryFactors:
    """Unit complex numbers [tokens, D / 2] that rotate what a forward holds."""

    query: Tensor  # the chunk's own tokens
    window: Tensor | None = None  # all tokens in reach, where they are remembered unrotated
    sink: Tensor | None = None  # the sink's, where they have moved


class RollingRope(nn.Module):
    """The transformer's rotary embedding (RoFormer, arXiv:2104.09864) at any latent frame.

    Its own table ends at 1024 positions; here angles are computed from integer positions in
    float64. What a position is depends on `memory.rope`: "absolute", the latent frame's number;
    "relative", its place in the window; "sink", its number, and the sink just before the window.
    """

    def __init__(self, rope: Any, memory: RolloutState) -> None:
        super().__init__()
        self.memory, self._patch = memory, rope.patch_size
        self._sizes = (rope.t_dim, rope.h_dim, rope.w_dim)
        self._known: dict[Any, Tensor] = {}  # of one chunk: the next has other positions

    def forward(self, latents: Tensor) -> RotaryFactors:
        """The rotations for latents [B, C, F, H, W] that start at `memory.first_frame`."""
        memory, kv = self.memory, self.memory.kv
        if kv is None:
            raise RuntimeError("set memory.kv before a forward")
        time, height, width = (
            size // patch for size, patch in zip(latents.shape[2:], self._patch, strict=True)
        )
        grid, like = (height, width), latents
        first = memory.first_frame // self._patch[0]
        if memory.rope == "relative":
            seen = kv.visible // (height * width)
            window = self._turns(0, seen, grid, like)
            return RotaryFactors(window[-time * height * width :], window=window)
        own = self._turns(first, time, grid, like)
        sink = kv.window.sink_tokens // (height * width)
        start = first + time - kv.visible // (height * width)  # of what is seen, had it no gap
        if memory.rope == "absolute" or not (start and sink):
            return RotaryFactors(own)
        return RotaryFactors(own, sink=self._turns(start, sink, grid, like))

    def _turns(self, first: int, frames: int, grid: tuple[int, int], like: Tensor) -> Tensor:
        key = (first, frames, grid, like.device, like.dtype)
        if key not in self._known:
            if len(self._known) > 8:  # what a few chunks need
                self._known.clear()
            exact = like.dtype == torch.float64
            turns = self._compute(first, frames, grid)
            self._known[key] = turns.to(torch.complex128 if exact else torch.complex64).to(
                like.device
            )
        return self._known[key]

    def _compute(self, first: int, frames: int, grid: tuple[int, int]) -> Tensor:
        """[frames * height * width, D / 2], complex128."""
        height, width = grid
        starts = (first, 0, 0)
        axes = []
        for axis, (start, count, size) in enumerate(
            zip(starts, (frames, height, width), self._sizes, strict=True)
        ):
            rates = ROPE_THETA ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
            angles = torch.outer(torch.arange(start, start + count, dtype=torch.float64), rates)
            view = [1, 1, 1, size // 2]
            view[axis] = count
            axes.append(angles.view(view).expand(frames, height, width, -1))
        angles = torch.cat(axes, -1).flatten(0, 2)
        return torch.polar(torch.ones_like(angles), angles)


class ExactTimesteps(nn.Module):
    """Sinusoidal timesteps in float64, as the original has them; diffusers' own are 4e-5 off."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, timesteps: Tensor) -> Tensor:
        """[B] to [B, channels], in the timesteps' dtype."""
        half = self.channels // 2
        rates = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = timesteps.double().cpu()[:, None] * rates
        return torch.cat([angles.cos(), angles.sin()], -1).to(timesteps)


class OncePerTimestep(nn.Module):
    """A module that is asked once for each timestep."""

    def __init__(self, module: nn.Module, memory: RolloutState) -> None:
        super().__init__()
        self.module, self.memory = module, memory
        self._known: dict[float, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """What it gives for the memory's timestep."""
        known = self._known.get(self.memory.timestep)
        if known is None:
            known = self._known[self.memory.timestep] = self.module(x)
        return known


@contextmanager
def use_kv_cache(transformer: Any, memory: RolloutState) -> Iterator[RolloutState]:
    """Let the transformer compute with `memory`; on exit it is as it was, error or not.

    The rotary embedding and what embeds timesteps are submodules of this instance, swapped and
    put back. Its prompt is the business of `prompt_kv`, entered inside.
    """
    embedder = transformer.condition_embedder
    with ExitStack() as undo:
        for number, block in enumerate(transformer.blocks):
            undo.callback(block.attn1.set_processor, block.attn1.processor)
            block.attn1.set_processor(RollingAttention(number, memory))
        swap(transformer, "rope", RollingRope(transformer.rope, memory), undo)
        timesteps = ExactTimesteps(embedder.timesteps_proj.num_channels)
        for name, module in (
            ("timesteps_proj", timesteps),
            ("time_embedder", embedder.time_embedder),
            ("time_proj", embedder.time_proj),
        ):
            swap(embedder, name, OncePerTimestep(module, memory), undo)
        yield memory


def _projected(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, L, H*D]."""
    if attn.fused_projections:
        query, key, value = attn.to_qkv(x).chunk(3, dim=-1)
        return query, key, value
    return attn.to_q(x), attn.to_k(x), attn.to_v(x)


def by_head(attn: Any, x: Tensor) -> Tensor:
    """[B, L, H*D] to [B, H, L, D]."""
    return x.view(*x.shape[:2], attn.heads, -1).transpose(1, 2)


def attend(attn: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, H, L, D] attends to [B, H, M, D]; [B, L, H*D]."""
    mixed = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    out: Tensor = attn.to_out[1](attn.to_out[0](mixed))
    return out


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn each pair of channels of [B, H, L, D] by its complex number [L, D / 2]."""
    wide = x if x.dtype == torch.float64 else x.float()
    pairs = torch.view_as_complex(wide.reshape(*x.shape[:-1], -1, 2))
    turned = torch.view_as_real(pairs * turns).flatten(-2)
    return turned.to(x.dtype)
