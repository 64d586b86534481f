"""Rolling keys and values against a reference that keeps nothing, in float64."""

from dataclasses import dataclass, replace

import pytest
import torch
from diffusers import WanTransformer3DModel
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from wancli.caching.attention import ROPE_THETA
from wancli.caching.rolling import Reach, RollingKV
from wancli.geometry import Span
from wancli.models.denoiser import Prompts, Text, Window, causal

SIDE = 4  # latents: 2 x 2 tokens a latent frame
PER_FRAME = 4


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    return (
        WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
            out_channels=4, text_dim=8, freq_dim=16, ffn_dim=32, num_layers=2,
        )
        .double()
        .eval()
    )  # fmt: skip


def drawn(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class View:
    """Latent frames that one forward of a chunk sees, oldest first, and their positions."""

    own: tuple[int, ...]
    frames: tuple[int, ...]
    positions: tuple[int, ...]


def views(sizes, window, rope):
    """(first forward, later forwards) of every chunk, by lists of latent frames and nothing else."""
    held, out, at = [], [], 0
    for size in sizes:
        own = list(range(at, at + size))
        at += size
        if window.trim == "before":
            keep = window.frames - size
            if len(held) > keep:
                held = held[: window.sink] + held[len(held) - (keep - window.sink) :]
            forwards = [held + own, held + own]
        else:
            held = held[max(0, len(held) - window.frames) :]
            forwards = [held + own, (held + own)[-window.frames :]]
        held = held + own
        out.append([View(tuple(own), tuple(f), placed(f, window, rope)) for f in forwards])
    return out


def placed(frames, window, rope):
    if rope == "relative":
        return tuple(range(len(frames)))
    if rope == "sink":
        start = frames[-1] + 1 - len(frames)
        return tuple(start + i if i < window.sink else f for i, f in enumerate(frames))
    return tuple(frames)


def angles(frame, head_dim):
    """[PER_FRAME, head_dim / 2] of one latent frame at an integer position."""
    height = width = 2 * (head_dim // 6)
    rows = []
    for y in range(SIDE // 2):
        for x in range(SIDE // 2):
            row = []
            for position, size in ((frame, head_dim - 2 * height), (y, height), (x, width)):
                row += [position / ROPE_THETA ** (i / size) for i in range(0, size, 2)]
            rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def turned(x, frames, head_dim):
    """Rotate [1, len(frames) * PER_FRAME, heads, head_dim] by the positions of its latent frames."""
    theta = torch.cat([angles(f, head_dim) for f in frames])[None, :, None]
    a, b = x[..., 0::2], x[..., 1::2]
    pair = (a * theta.cos() - b * theta.sin(), a * theta.sin() + b * theta.cos())
    return torch.stack(pair, -1).flatten(-2)


class Recomputed:
    """Self-attention of all chunks so far at once, each over exactly the frames it may see."""

    def __init__(self, seen):
        self.seen = seen

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, mask=None, rotary_emb=None):
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        k = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1))
        v = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        out = []
        for view in self.seen:
            rows = tokens(view.frames)
            where = dict(zip(view.frames, view.positions, strict=True))
            query = turned(q[:, tokens(view.own)], [where[f] for f in view.own], q.shape[-1])
            key = turned(k[:, rows], view.positions, q.shape[-1])
            scores = torch.einsum("blhd,bmhd->bhlm", query, key) * q.shape[-1] ** -0.5
            out.append(torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v[:, rows]).flatten(2))
        return attn.to_out[0](torch.cat(out, 1))


def tokens(frames):
    return [f * PER_FRAME + i for f in frames for i in range(PER_FRAME)]


def recomputed(transformer, latents, timesteps, seen, text):
    """Velocity of the last chunk, with everything before it computed anew."""
    before = dict(transformer.attn_processors)
    ours = {n: Recomputed(seen) if ".attn1." in n else p for n, p in before.items()}
    transformer.set_attn_processor(ours)
    try:
        with torch.no_grad():
            out = transformer(latents, timesteps, text, return_dict=False)[0]
    finally:
        transformer.set_attn_processor(before)
    return out[:, :, -len(seen[-1].own) :]


def compare(transformer, sizes, window, rope):
    """Largest difference of any forward's velocity from the recomputed one."""
    text = drawn(1, 3, 8, seed=7)
    cleans, times, worst, at = [], [], 0.0, 0
    seen = views(sizes, window, rope)
    with causal(transformer, window, rope=rope) as model:
        model.tell(Prompts(Text(text)))
        for index, size in enumerate(sizes):
            model.begin(Span(index, at, size))
            clean = drawn(1, 4, size, SIDE, SIDE, seed=index)
            for forward, t in enumerate((800.0, 300.0)):
                noisy = drawn(1, 4, size, SIDE, SIDE, seed=100 * index + forward + 1)
                velocity = model.velocity(noisy, t)
                # chunks before this one were remembered in a later forward than their first
                past = [chunk[1] for chunk in seen[:index]]
                told = torch.tensor([[*times, *([t] * size * PER_FRAME)]], dtype=torch.float64)
                with stock(transformer) as plain:
                    expected = recomputed(
                        plain, torch.cat([*cleans, noisy], 2), told,
                        [*past, seen[index][min(forward, 1)]], text,
                    )  # fmt: skip
                worst = max(worst, (velocity - expected).abs().max().item())
            model.remember(clean, 20.0)
            cleans.append(clean)
            times += [20.0] * size * PER_FRAME
            at += size
    return worst


def stock(transformer):
    """A copy with the same weights that no cache is entered on."""
    from contextlib import nullcontext

    if not hasattr(stock, "copy"):
        stock.copy = WanTransformer3DModel.from_config(transformer.config).double().eval()
        own = {n: p for n, p in transformer.state_dict().items()}
        stock.copy.load_state_dict({n.replace("condition_embedder.embedder.", "condition_embedder."): p for n, p in own.items()})
    return nullcontext(stock.copy)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 3), min_size=2, max_size=6),
    frames=st.integers(2, 8),
    sink=st.integers(0, 3),
    trim=st.sampled_from(["before", "after"]),
    rope=st.sampled_from(["absolute", "relative", "sink"]),
)
def test_a_rolled_window_computes_what_recomputing_everything_does(
    transformer, sizes, frames, sink, trim, rope
):
    assume(frames >= sink + max(sizes))
    assume(trim == "before" or sink == 0)
    window = Window(frames, sink, max(sizes), PER_FRAME, trim)
    assert compare(transformer, sizes, window, rope) < 1e-7
