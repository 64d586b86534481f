"""Self-attention over a rolling KV cache, through diffusers' own seam: `set_attn_processor`.

Shapes: B batch, L tokens of this forward, M visible tokens, H heads, D head size.
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
    """State of a rollout that one transformer's modules share; only the denoiser writes it."""

    rope: RopePolicy = "absolute"
    kv: RollingKV | None = None  # of the branch (cond or uncond) of the next forward
    first_frame: int = 0  # latent frame at which the current chunk begins
    timestep: float = 0.0  # of the next forward


class RollingAttention:
    """Wan self-attention of one chunk over the window of a rollout."""

    def __init__(self, block: int, state: RolloutState) -> None:
        self.block, self.state = block, state

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Any = None,
    ) -> Tensor:
        """[B, L, H*D] attends to the M visible tokens; `rotary_emb` is `RollingRope`'s."""
        kv, factors = self.state.kv, rotary_emb
        if kv is None or not isinstance(factors, RotaryFactors):
            raise RuntimeError("enter rolling self-attention through `use_kv_cache`")
        query, key, value = _projected(attn, hidden_states)
        query, key = by_head(attn, attn.norm_q(query)), by_head(attn, attn.norm_k(key))
        value = by_head(attn, value)
        query = rotate(query, factors.query)
        if factors.window is not None:  # keys are cached unrotated
            key, value = kv.write(self.block, key, value)
            key = rotate(key, factors.window)
        else:
            if self.state.rope == "sink":
                kv.keep_raw_sink(self.block, key)
            rotated = rotate(key, factors.query)
            if factors.sink is not None:
                kv.put_sink(self.block, rotate(kv.raw_sink[self.block], factors.sink))
            key, value = kv.write(self.block, rotated, value)
        return attend(attn, query, key, value)


@dataclass(frozen=True)
class RotaryFactors:
    """Rotary factors of one forward: unit complex numbers [tokens, D / 2]."""

    query: Tensor  # of the chunk's own tokens
    window: Tensor | None = None  # of all visible tokens, if keys are cached unrotated
    sink: Tensor | None = None  # of the sink's tokens, if their positions have moved


class RollingRope(nn.Module):
    """The transformer's rotary embedding (RoFormer, arXiv:2104.09864) at any latent frame.

    diffusers' table ends at 1024 positions; this one computes angles from integer positions in
    float64. `state.rope` selects the temporal position: "absolute", the latent frame's number;
    "relative", its place in the window; "sink", its number, with the sink just before the window.
    """

    def __init__(self, rope: Any, state: RolloutState) -> None:
        super().__init__()
        self.state, self._patch = state, rope.patch_size
        self._sizes = (rope.t_dim, rope.h_dim, rope.w_dim)
        self._cache: dict[Any, Tensor] = {}  # of a few chunks: later ones have other positions

    def forward(self, latents: Tensor) -> RotaryFactors:
        """Factors for latents [B, C, F, H, W] that begin at `state.first_frame`."""
        state, kv = self.state, self.state.kv
        if kv is None:
            raise RuntimeError("set state.kv before a forward")
        time, height, width = (
            size // patch for size, patch in zip(latents.shape[2:], self._patch, strict=True)
        )
        grid, like = (height, width), latents
        first = state.first_frame // self._patch[0]
        visible = kv.visible // (height * width)
        if state.rope == "relative":
            window = self._factors(0, visible, grid, like)
            return RotaryFactors(window[-time * height * width :], window=window)
        query = self._factors(first, time, grid, like)
        sink = kv.sink // (height * width)
        start = first + time - visible  # position of the sink, moved up to the window
        if state.rope == "absolute" or not (start and sink):
            return RotaryFactors(query)
        return RotaryFactors(query, sink=self._factors(start, sink, grid, like))

    def _factors(self, first: int, frames: int, grid: tuple[int, int], like: Tensor) -> Tensor:
        key = (first, frames, grid, like.device, like.dtype)
        if key not in self._cache:
            if len(self._cache) > 8:  # enough for a few chunks
                self._cache.clear()
            dtype = torch.complex128 if like.dtype == torch.float64 else torch.complex64
            self._cache[key] = self._compute(first, frames, grid).to(dtype).to(like.device)
        return self._cache[key]

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
    """Sinusoidal timestep embedding in float64, as in Wan's own code; diffusers' is 4e-5 off."""

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
    """A module that runs once per timestep."""

    def __init__(self, module: nn.Module, state: RolloutState) -> None:
        super().__init__()
        self.module, self.state = module, state
        self._outputs: dict[float, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """The module's output for the state's timestep."""
        output = self._outputs.get(self.state.timestep)
        if output is None:
            output = self._outputs[self.state.timestep] = self.module(x)
        return output


@contextmanager
def use_kv_cache(transformer: Any, state: RolloutState) -> Iterator[RolloutState]:
    """Let the transformer attend to `state.kv`; restored on exit, even after an error.

    Swaps self-attention processors, and the instance's rotary and timestep embeddings. Prompts are
    cached by `prompt_kv`, entered inside.
    """
    embedder = transformer.condition_embedder
    with ExitStack() as undo:
        for number, block in enumerate(transformer.blocks):
            undo.callback(block.attn1.set_processor, block.attn1.processor)
            block.attn1.set_processor(RollingAttention(number, state))
        swap(transformer, "rope", RollingRope(transformer.rope, state), undo)
        timesteps = ExactTimesteps(embedder.timesteps_proj.num_channels)
        for name, module in (
            ("timesteps_proj", timesteps),
            ("time_embedder", embedder.time_embedder),
            ("time_proj", embedder.time_proj),
        ):
            swap(embedder, name, OncePerTimestep(module, state), undo)
        yield state


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
    """[B, H, L, D] attends to [B, H, M, D]: [B, L, H*D]."""
    mixed = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    out: Tensor = attn.to_out[1](attn.to_out[0](mixed))
    return out


def rotate(x: Tensor, factors: Tensor) -> Tensor:
    """Rotate each pair of channels of [B, H, L, D] by its complex factor [L, D / 2]."""
    wide = x if x.dtype == torch.float64 else x.float()
    pairs = torch.view_as_complex(wide.reshape(*x.shape[:-1], -1, 2))
    rotated = torch.view_as_real(pairs * factors).flatten(-2)
    return rotated.to(x.dtype)
