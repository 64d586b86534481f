"""The rolling KV cache against full recomputation, in float64."""

from dataclasses import dataclass

import pytest
import torch
from diffusers import WanTransformer3DModel
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from wancli.caching.rolling_attention import ROPE_THETA, rotate_complex, rotate_real
from wancli.caching.rolling_kv import RollingKV
from wancli.catalog.geometry import Span, WindowConfig
from wancli.rollouts.denoiser import PromptPair, causal

SIDE = 4  # latents: 2 x 2 tokens a latent frame
PER_FRAME = 4


class DoubleTimesteps(torch.nn.Module):
    def forward(self, timesteps):
        rates = torch.tensor([10_000.0 ** (-i / 8) for i in range(8)], dtype=torch.float64)
        angles = timesteps[:, None] * rates
        return torch.cat([angles.cos(), angles.sin()], -1)


def tiny(head_dim=12):
    with torch.random.fork_rng():
        torch.random.manual_seed(0)  # diffusers takes no generator
        model = WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=head_dim, in_channels=4,
            out_channels=4, text_dim=8, freq_dim=16, ffn_dim=32, num_layers=2,
        )  # fmt: skip
    return model.double().eval()


@pytest.fixture(scope="module")
def transformer():
    return tiny()


@pytest.fixture(scope="module")
def plain():
    """A stock model with the same weights, to recompute everything."""
    model = tiny()
    model.condition_embedder.timesteps_proj = DoubleTimesteps()  # diffusers' own are float32
    return model


def draw(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class View:
    """Latent frames that one forward of a chunk attends to, oldest first, and their positions."""

    own: tuple[int, ...]
    frames: tuple[int, ...]
    positions: tuple[int, ...]


def views(sizes, window, rope):
    """The views of the first and of later forwards of every chunk, from lists of latent frames."""
    cached: list[int] = []
    out, at = [], 0
    for size in sizes:
        own = list(range(at, at + size))
        at += size
        if window.trim == "before":
            keep = window.window - size
            if len(cached) > keep:
                cached = cached[: window.sink] + cached[len(cached) - (keep - window.sink) :]
            forwards = [cached + own, cached + own]
        else:
            cached = cached[max(0, len(cached) - window.window) :]
            forwards = [cached + own, (cached + own)[-window.window :]]
        cached = cached + own
        out.append([View(tuple(own), tuple(f), rope_positions(f, window, rope)) for f in forwards])
    return out


def rope_positions(frames, window, rope):
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


def rotate(x, frames, head_dim):
    """Rotate [1, len(frames) * PER_FRAME, heads, head_dim] by its latent frames' positions."""
    theta = torch.cat([angles(f, head_dim) for f in frames])[None, :, None]
    a, b = x[..., 0::2], x[..., 1::2]
    pair = (a * theta.cos() - b * theta.sin(), a * theta.sin() + b * theta.cos())
    return torch.stack(pair, -1).flatten(-2)


class Recomputed:
    """Self-attention of all chunks so far at once, each over exactly its visible frames."""

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
            query = rotate(q[:, tokens(view.own)], [where[f] for f in view.own], q.shape[-1])
            key = rotate(k[:, rows], view.positions, q.shape[-1])
            scores = torch.einsum("blhd,bmhd->bhlm", query, key) * q.shape[-1] ** -0.5
            out.append(torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v[:, rows]).flatten(2))
        return attn.to_out[0](torch.cat(out, 1))


def tokens(frames):
    return [f * PER_FRAME + i for f in frames for i in range(PER_FRAME)]


@torch.no_grad()
def recompute(plain, latents, timesteps, seen, text):
    """Velocity of the last chunk, with everything before it recomputed."""
    processors = plain.attn_processors
    processors_with_recomputation = {
        n: Recomputed(seen) if ".attn1." in n else p for n, p in processors.items()
    }
    plain.set_attn_processor(processors_with_recomputation)
    out = plain(latents, timesteps, text, return_dict=False)[0]
    return out[:, :, -len(seen[-1].own) :]


def compare(transformer, plain, sizes, window, rope):
    """Largest difference of any forward's velocity from the recomputed one."""
    text, seen = draw(1, 3, 8, seed=7), views(sizes, window, rope)
    cleans: list[torch.Tensor] = []
    times: list[float] = []
    worst, at = 0.0, 0
    with causal(transformer, window, rope=rope) as model:
        model.set_prompt(PromptPair(text))
        for index, size in enumerate(sizes):
            model.begin(Span(index, at, size))
            for forward, timestep in enumerate((800.0, 300.0)):
                noisy = draw(1, 4, size, SIDE, SIDE, seed=100 * index + forward + 1)
                timesteps = torch.tensor(
                    [times + [timestep] * size * PER_FRAME], dtype=torch.float64
                )
                latents = torch.cat([*cleans, noisy], 2)
                past = [chunk[1] for chunk in seen[:index]]  # a clean pass is a later forward
                expected = recompute(plain, latents, timesteps, [*past, seen[index][forward]], text)
                error = model.velocity(noisy, timestep) - expected
                worst = max(worst, error.abs().max().item())
            cleans.append(draw(1, 4, size, SIDE, SIDE, seed=-index - 1))
            model.commit(cleans[-1], 20.0)
            times += [20.0] * size * PER_FRAME
            at += size
    return worst


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 3), min_size=2, max_size=6),
    frames=st.integers(2, 8),
    sink=st.integers(0, 3),
    trim=st.sampled_from(["before", "after"]),
    rope=st.sampled_from(["absolute", "relative", "sink"]),
)
def test_a_rolling_window_equals_full_recomputation(  # noqa: PLR0913
    transformer, plain, sizes, frames, sink, trim, rope
):
    assume(frames >= sink + max(sizes))
    assume(trim == "before" or sink == 0)
    window = WindowConfig(frames, sink, max(sizes), PER_FRAME, trim)
    assert compare(transformer, plain, sizes, window, rope) < 1e-12


def test_a_rollout_continues_past_latent_frame_1024(transformer, plain):
    window = WindowConfig(4, 0, 2, PER_FRAME)
    far, near = (third_velocity(transformer, window, first=first) for first in (5000, 0))
    assert (far - near).abs().max() < 1e-9  # rotary positions are relative
    latents, text = draw(1, 4, 1026, SIDE, SIDE, seed=0), draw(1, 3, 8, seed=7)
    with pytest.raises(RuntimeError):  # as diffusers itself fails
        plain(latents, torch.tensor([0.0]), text)


def third_velocity(transformer, window, *, first):
    """Velocity of the third chunk of a rollout that starts at latent frame `first`."""
    with causal(transformer, window) as model:
        model.set_prompt(PromptPair(draw(1, 3, 8, seed=7)))
        for index in range(3):
            model.begin(Span(index, first + 2 * index, 2))
            chunk = draw(1, 4, 2, SIDE, SIDE, seed=index)
            velocity = model.velocity(chunk, 500.0)
            model.commit(chunk, 0.0)
    return velocity


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_real_and_complex_rotations_are_equal_to_the_bit(dtype):
    model = tiny(128).to(dtype)  # the head size of every Wan
    with causal(model, WindowConfig(4, 0, 2, PER_FRAME)) as denoiser:
        denoiser.set_prompt(PromptPair(draw(1, 3, 8, seed=7)))
        denoiser.begin(Span(0, 5000, 2))
        latents = draw(1, 4, 2, SIDE, SIDE, seed=0).to(dtype)
        denoiser.velocity(latents, 500.0)
        table = model.rope(latents).table
    x = draw(2, 2 * PER_FRAME, 3, 128, seed=1).to(dtype)
    assert torch.equal(rotate_real(x, table), rotate_complex(x, table))
    assert not torch.equal(rotate_real(x, table), x)


@pytest.mark.parametrize(("rope", "sink_frame"), [("absolute", 0), ("relative", 1)])
def test_recaching_recomputes_the_window_under_the_new_prompt(transformer, rope, sink_frame):
    window = WindowConfig(3, 1, 1, PER_FRAME)
    chunks = [draw(1, 4, 1, SIDE, SIDE, seed=index) for index in range(5)]
    prompts = [PromptPair(draw(1, 3, 8, seed=seed)) for seed in (7, 8)]

    def velocity(committed, prompt, *, recached):
        with causal(transformer, window, rope=rope) as model:
            model.set_prompt(prompt)
            for index in committed:
                frame = sink_frame if 1 not in committed and not index else index
                model.begin(Span(index, frame, 1))
                model.commit(chunks[index], 5.0)
            model.set_prompt(prompts[1])
            if recached:
                model.recache()
            model.begin(Span(4, 4, 1))
            return model.velocity(chunks[4], 500.0)

    # the sink's chunk, and the two still in the window
    anew = velocity([0, 2, 3], prompts[1], recached=False)
    assert torch.equal(velocity(range(4), prompts[0], recached=True), anew)
    assert not torch.equal(velocity(range(4), prompts[0], recached=False), anew)


def test_a_failed_chunk_can_be_restarted(transformer):
    window = WindowConfig(4, 1, 2, PER_FRAME)
    whole = third_velocity(transformer, window, first=0)

    def fail(*_):
        raise MemoryError

    with causal(transformer, window) as model:
        model.set_prompt(PromptPair(draw(1, 3, 8, seed=7)))
        for index in range(3):
            model.begin(Span(index, 2 * index, 2))
            chunk = draw(1, 4, 2, SIDE, SIDE, seed=index)
            hook = transformer.blocks[1].ffn.register_forward_pre_hook(fail)
            with pytest.raises(MemoryError):
                model.velocity(2 * chunk, 900.0)
            hook.remove()
            model.begin(Span(index, 2 * index, 2))
            velocity = model.velocity(chunk, 500.0)
            model.commit(chunk, 0.0)
    assert torch.equal(velocity, whole)


def test_the_transformer_is_restored_even_after_an_error(transformer):
    before = dict(transformer.attn_processors)
    parts = (transformer.rope, transformer.condition_embedder)
    timesteps = transformer.condition_embedder.timesteps_proj

    def fail() -> None:
        with causal(transformer, WindowConfig(4, 0, 2, PER_FRAME)):
            assert transformer.rope is not parts[0]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert transformer.attn_processors == before
    assert (transformer.rope, transformer.condition_embedder) == parts
    assert transformer.condition_embedder.timesteps_proj is timesteps


def test_rollouts_and_branches_are_independent(transformer):
    window = WindowConfig(4, 0, 2, PER_FRAME)
    prompts = PromptPair(draw(1, 3, 8, seed=7), draw(1, 3, 8, seed=8))

    def run(scale, pair):
        with causal(transformer, window, guidance_scale=scale) as model:
            model.set_prompt(pair)
            for index in range(2):
                model.begin(Span(index, 2 * index, 2))
                chunk = draw(1, 4, 2, SIDE, SIDE, seed=index)
                velocity = model.velocity(chunk, 500.0)
                model.commit(chunk, 0.0)
        return velocity

    cond = run(1.0, PromptPair(prompts.cond))
    assert prompts.uncond is not None
    uncond = run(1.0, PromptPair(prompts.uncond))
    assert not torch.equal(cond, uncond)
    assert torch.equal(run(3.0, prompts), uncond + 3.0 * (cond - uncond))


def test_the_cache_does_not_grow(transformer):
    kv = RollingKV(
        WindowConfig(6, sink=1, chunk=2, tokens_per_frame=1), blocks=1, batch=1, heads=1,
        head_dim=2, dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    addresses = set()
    for index in range(50):
        kv.begin(2)
        for rows in (kv.keys, kv.values):
            rows[:, :, kv.stored : kv.stored + 2] = index
        kv.commit()
        addresses.add((kv.keys.data_ptr(), kv.blocks[0].keys.data_ptr(), kv.values.data_ptr()))
    assert kv.blocks[0].keys[0, :, 0, 0].tolist() == [0, 47, 48, 48, 49, 49]
    assert len(addresses) == 1


def test_the_first_frames_of_a_shot_stay_until_the_next_one():
    """Wherever they are in their chunk, and however many leave at once."""
    kv = RollingKV(
        WindowConfig(7, sink=1, chunk=2, tokens_per_frame=1), blocks=1, batch=1, heads=1,
        head_dim=2, dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    seen = []
    for first in range(0, 20, 2):
        kv.begin(2)
        kv.keys[0, 0, kv.stored : kv.stored + 2] = torch.tensor([first, first + 1])[:, None, None]
        kv.commit()
        if first in (4, 14):
            kv.keep(2)
        seen.append(kv.keys[0, 0, : kv.stored, 0, 0].int().tolist())
    assert seen[2:] == [
        [0, 1, 2, 3, 4, 5],
        [0, 2, 3, 4, 5, 6, 7],
        [0, 4, 5, 6, 7, 8, 9],
        [0, 4, 7, 8, 9, 10, 11],
        [0, 4, 9, 10, 11, 12, 13],
        [0, 4, 11, 12, 13, 14, 15],
        [0, 12, 13, 14, 15, 16, 17],
        [0, 14, 15, 16, 17, 18, 19],
    ]


def test_a_chunk_that_does_not_fit_is_rejected():
    kv = RollingKV(
        WindowConfig(4, sink=2, chunk=3, tokens_per_frame=1), blocks=1, batch=1, heads=1,
        head_dim=2, dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="does not fit"):
        kv.begin(3)


def test_experts_split_the_steps_and_both_cache_every_chunk(transformer):
    torch.manual_seed(1)  # noqa: TID251 - diffusers takes no generator
    other = WanTransformer3DModel.from_config(transformer.config).double().eval()
    window = WindowConfig(4, 0, 2, PER_FRAME)

    def run(models, **options):
        velocities = []
        with causal(models, window, **options) as model:
            model.set_prompt(PromptPair(draw(1, 3, 8, seed=7), draw(1, 3, 8, seed=8)))
            for index in range(3):
                model.begin(Span(index, 2 * index, 2))
                chunk = draw(1, 4, 2, SIDE, SIDE, seed=index)
                velocities.append([model.velocity(chunk, t) for t in (900.0, 875.0, 300.0)])
                model.commit(chunk, 0.0)
        return velocities

    both = run((transformer, other), guidance_scale=(3.0, 2.0), boundary=875.0)
    high, low = run(transformer, guidance_scale=3.0), run(other, guidance_scale=2.0)
    for velocities, first, second in zip(both, high, low, strict=True):
        assert torch.equal(velocities[0], first[0])
        assert torch.equal(velocities[1], first[1])
        assert torch.equal(velocities[2], second[2])
