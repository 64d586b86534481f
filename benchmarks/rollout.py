"""Seconds per chunk with the rolling K/V cache, a concatenated cache and no cache.

`make bench-rollout`. All arms alternate chunk by chunk in one process with the same weights, and
their outputs are compared. A chunk has five forwards: four steps and the clean pass.
"""

import argparse
import copy
import logging
import platform
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from wancli.catalog.geometry import Span, Trim, WindowConfig
from wancli.demo.causal import Layout, causal_velocity, slots
from wancli.models.optimize import compile_blocks
from wancli.rollouts.denoiser import CausalDenoiser, PromptPair, causal

DIM, HEADS, LAYERS, FFN, TEXT = 384, 3, 6, 2240, 512
CHUNK, PER_FRAME = 3, 132  # latent frames, tokens per frame: 396 tokens per chunk
HEIGHT, WIDTH = 22, 24  # latents
TIMESTEPS = (1000.0, 937.5, 833.3333, 625.0)

logger = logging.getLogger("wancli.bench")


def make_transformer(dtype: torch.dtype) -> Any:
    """A transformer in Wan's proportions, with random weights."""
    torch.manual_seed(0)  # noqa: TID251 - diffusers takes no generator
    model = WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=DIM // HEADS, ffn_dim=FFN, num_layers=LAYERS,
        text_dim=256, freq_dim=256, in_channels=16, out_channels=16, cross_attn_norm=True,
    )  # fmt: skip
    return model.to(dtype).eval()


class ConcatenatedAttention:
    """Self-attention with a concatenated K/V cache, as in diffusers PR #13569.

    A chunk's first forward appends to the cache, the others overwrite its end; then it is trimmed.
    """

    def __init__(self, state: "ConcatenatedState") -> None:
        self.state = state
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None,
        attention_mask: Any = None, rotary_emb: Any = None,
    ) -> Tensor:  # fmt: skip
        """[B, L, H*D] to [B, L, H*D]."""
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        query, key = (_rotate(x, *rotary_emb) for x in (query, key))
        if self.keys is not None and self.values is not None:
            end = self.keys.shape[1] - (0 if self.state.appends else key.shape[1])
            key = torch.cat([self.keys[:, :end], key], 1)
            value = torch.cat([self.values[:, :end], value], 1)
        self.keys = key[:, -self.state.window :]
        self.values = value[:, -self.state.window :]
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = attn.to_out[0](mixed)
        return out


@dataclass
class ConcatenatedState:
    """State shared by all layers."""

    window: int  # tokens
    appends: bool = True


class ShiftedRope(torch.nn.Module):
    """The transformer's rotary embedding from latent frame `first`."""

    def __init__(self, rope: Any) -> None:
        super().__init__()
        self.rope, self.first = rope, 0

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of latents [B, C, F, H, W]."""
        frames = latents.shape[2]
        longer = torch.empty(1, 1, self.first + frames, *latents.shape[3:], device="meta")
        cos, sin = (table.to(latents.device) for table in self.rope(longer))
        before = cos.shape[1] * self.first // (self.first + frames)
        return cos[:, before:], sin[:, before:]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2], out[..., 1::2] = even * cos - odd * sin, even * sin + odd * cos
    return out


@dataclass
class Arm:
    """A method to compute a chunk, with its times and outputs."""

    name: str
    chunk: Callable[[int, list[Tensor], Tensor], Tensor]
    seconds: list[float] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


def cached(model: CausalDenoiser) -> Callable[[int, list[Tensor], Tensor], Tensor]:
    """Denoise with the rolling K/V cache."""

    def chunk(index: int, noisy: list[Tensor], clean: Tensor) -> Tensor:
        model.begin(Span(index, index * CHUNK, CHUNK))
        for latents, timestep in zip(noisy, TIMESTEPS, strict=True):
            velocity = model.velocity(latents, timestep)
        model.commit(clean, 0.0)
        return velocity

    return chunk


def concatenating(
    transformer: Any, text: Tensor, window: int
) -> Callable[[int, list[Tensor], Tensor], Tensor]:
    """Denoise with a cache that every layer concatenates and slices in every forward."""
    state, rope = ConcatenatedState(window), ShiftedRope(transformer.rope)
    transformer.rope = rope
    processors = {
        name: ConcatenatedAttention(state) if ".attn1." in name else processor
        for name, processor in transformer.attn_processors.items()
    }
    transformer.set_attn_processor(processors)

    def chunk(index: int, noisy: list[Tensor], clean: Tensor) -> Tensor:
        rope.first, state.appends = index * CHUNK, True
        for latents, timestep in zip(noisy, TIMESTEPS, strict=True):
            velocity: Tensor = forward(latents, timestep)
            state.appends = False
        forward(clean, 0.0)
        return velocity

    def forward(latents: Tensor, timestep: float) -> Tensor:
        timesteps = torch.tensor([timestep], device=latents.device)
        out: Tensor = transformer(latents, timesteps, text, return_dict=False)[0]
        return out

    return chunk


def recomputing(transformer: Any, text: Tensor) -> Callable[[int, list[Tensor], Tensor], Tensor]:
    """Recompute all chunks in every forward, under a block-causal mask; needs no clean pass."""
    past: list[Tensor] = []

    def chunk(index: int, noisy: list[Tensor], clean: Tensor) -> Tensor:
        before = torch.cat([*past, clean[:, :, :0]], 2)
        layout = Layout(
            slots(clean=index, noisy=range(index, index + 1), chunk=CHUNK),
            tokens_per_frame=PER_FRAME,
        )
        with layout.applied_to(transformer):
            for latents, timestep in zip(noisy, TIMESTEPS, strict=True):
                sigmas = torch.full((1, CHUNK), timestep / 1000)
                velocity = causal_velocity(transformer, before, latents, sigmas, text)
        past.append(clean)
        return velocity

    return chunk


@torch.no_grad()
def compare(*, chunks: int, window: int, dtype: torch.dtype) -> list[Arm]:
    """Run every arm on the same inputs; `window` in latent frames, 0 for all."""
    plain = make_transformer(dtype)
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(1, TEXT, 256, generator=generator).to(dtype)
    frames = window or chunks * CHUNK
    with ExitStack() as stack:

        def ours(
            trim: Trim = "before", *, compiled: bool = False
        ) -> Callable[[int, list[Tensor], Tensor], Tensor]:
            config = WindowConfig(frames, 0, CHUNK, PER_FRAME, trim)
            transformer = copy.deepcopy(plain)
            if compiled:
                torch._dynamo.reset()  # of another window's graphs, one would be made for both
                compile_blocks(transformer, "default")
            model = stack.enter_context(causal(transformer, config))
            model.set_prompt(PromptPair(text))
            if compiled:
                spans = [Span(index, index * CHUNK, CHUNK) for index in range(chunks)]
                model.warm_up(spans, torch.zeros(1, 16, CHUNK, HEIGHT, WIDTH))
            return cached(model)

        arms = [
            Arm("ours", ours()),
            Arm("ours, trim after", ours("after")),
            Arm("ours, compiled", ours(compiled=True)),
            Arm("concatenating", concatenating(copy.deepcopy(plain), text, frames * PER_FRAME)),
        ]
        if not window:
            arms.append(Arm("recomputing", recomputing(copy.deepcopy(plain), text)))
        for index in range(chunks):
            inputs = [
                torch.randn(1, 16, CHUNK, HEIGHT, WIDTH, generator=generator).to(dtype)
                for _ in range(len(TIMESTEPS) + 1)
            ]
            for turn in range(len(arms)):
                arm = arms[(index + turn) % len(arms)]
                started = perf_counter()
                arm.outputs.append(arm.chunk(index, inputs[:-1], inputs[-1]).float())
                arm.seconds.append(perf_counter() - started)
    return arms


def report(arms: list[Arm], *, window: int) -> None:
    """Print seconds per chunk, sums, ratios to ours, and differences of the outputs."""
    logger.info("%18s%s%9s%8s  largest difference", "seconds", "".join(
        f"{i + 1:6}" for i in range(len(arms[0].seconds))), "sum", "ratio")  # fmt: skip
    ours, after = arms[0], arms[1]
    for arm in arms:
        same_window = after if window and arm.name == "concatenating" else ours
        worst = max(
            float((a - b).abs().max())
            for a, b in zip(arm.outputs, same_window.outputs, strict=True)
        )
        ratio = sum(arm.seconds) / sum(ours.seconds)
        row = "".join(f"{s:6.2f}" for s in arm.seconds)
        against = f"to {same_window.name}: {worst:.1e}" if arm is not same_window else ""
        logger.info("%18s%s%9.2f%8.2f  %s", arm.name, row, sum(arm.seconds), ratio, against)


def main() -> None:
    """Measure every combination of options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=__doc__)
    parser.add_argument("--chunks", type=int, default=12)
    parser.add_argument(
        "--windows", type=int, nargs="*", default=[0, 6], help="latent frames; 0: no limit"
    )
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    diffusers_logging.set_verbosity_error()
    logger.info("torch %s, %s", torch.__version__, platform.processor() or platform.machine())
    compare(chunks=1, window=0, dtype=dtype)  # warm
    for threads in options.threads:
        torch.set_num_threads(threads)
        for window in options.windows:
            history = f"window {window}" if window else "full history"
            logger.info(
                "\n%d thread%s, %s, %s", threads, "s" * (threads > 1), history, options.dtype
            )
            arms = compare(chunks=options.chunks, window=window, dtype=dtype)
            report(arms, window=window)


if __name__ == "__main__":
    main()
