"""The causal layout equals diffusers' own attention under the explicit mask, in float64."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor, nn

from wancli.demo.causal import (
    DenseAttention,
    Layout,
    attention_mask,
    causal_velocity,
    query_spans,
    slots,
)
from wancli.demo.lean import lean_velocity

CHANNELS, SIDE, CHUNK, CHUNKS, TEXT = 4, 4, 2, 3, 5
TOKENS_PER_FRAME = 4  # 4x4 latents in patches of 2x2

# Float64, but diffusers' norms and modulation and our softmax round to float32: 6e-8 each time.
# Measured: 1.1e-7 at most; one latent frame wrong in the mask: 4e-2, or in the positions: 2e-2.
TOLERANCE = 1e-6


class MaskedAttention:
    """Stock self-attention with a mask, which the stock transformer cannot be passed."""

    def __init__(self, mask: Tensor) -> None:
        self.mask, self.stock = mask, WanAttnProcessor()

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None
    ):
        return self.stock(attn, hidden_states, None, self.mask, rotary_emb)


class CleanAndNoisyRope(nn.Module):
    """Stock positions of a clean and a noisy video that start at the same frame."""

    def __init__(self, rope: nn.Module, clean_frames: int) -> None:
        super().__init__()
        self.rope, self.clean_frames = rope, clean_frames

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        parts = latents[:, :, : self.clean_frames], latents[:, :, self.clean_frames :]
        return tuple(torch.cat(halves, 1) for halves in zip(*map(self.rope, parts), strict=True))


@pytest.fixture
def transformer() -> WanTransformer3DModel:
    """Random weights, 2 layers, float64."""
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        return (
            WanTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=CHANNELS,
                out_channels=CHANNELS,
                text_dim=8,
                freq_dim=16,
                ffn_dim=32,
                num_layers=2,
            )
            .double()
            .eval()
        )


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def inputs(draw) -> dict[str, Tensor]:
    """Two clean chunks, three noisy ones, and a sigma for each noisy frame."""
    return {
        "clean": draw(2, CHANNELS, (CHUNKS - 1) * CHUNK, SIDE, SIDE),
        "noisy": draw(2, CHANNELS, CHUNKS * CHUNK, SIDE, SIDE),
        "sigmas": torch.tensor([[0.9, 0.5, 0.2], [0.1, 0.7, 1.0]]).repeat_interleave(CHUNK, 1),
        "embeddings": draw(2, TEXT, 8),
    }


@pytest.fixture
def layout() -> Layout:
    sequence = slots(clean=CHUNKS - 1, noisy=range(CHUNKS), chunk=CHUNK)
    return Layout(sequence, tokens_per_frame=TOKENS_PER_FRAME)


def relative(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).abs().max() / reference.abs().max())


@torch.no_grad()
def velocity_of(transformer, layout, inputs, **changes) -> Tensor:
    with layout.applied_to(transformer):
        return causal_velocity(transformer, **{**inputs, **changes})


def test_a_noisy_chunk_sees_the_clean_chunks_before_it_and_itself():
    mask = attention_mask(slots(clean=1, noisy=range(2), chunk=1))  # clean 0, noisy 0, noisy 1
    assert mask.tolist() == [[True, False, False], [False, True, False], [True, False, True]]


def test_the_reaches_of_a_layout_equal_its_mask():
    sequence = slots(clean=2, noisy=range(3), chunk=2)
    mask = torch.zeros(len(sequence) * 3, len(sequence) * 3, dtype=torch.bool)
    for rows, keys in query_spans(sequence, 3):
        for columns in keys:
            mask[rows, columns] = True
    expected = attention_mask(sequence).repeat_interleave(3, 0).repeat_interleave(3, 1)
    assert torch.equal(mask, expected)


@torch.no_grad()
def test_dense_attention_equals_stock_attention_under_the_mask(draw):
    sequence = slots(clean=2, noisy=range(3), chunk=2)
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        attention = WanAttention(dim=24, heads=2, dim_head=12).double()
    mask = attention_mask(sequence).repeat_interleave(3, 0).repeat_interleave(3, 1)
    x, angles = draw(2, len(mask), 24), draw(1, len(mask), 1, 6).repeat_interleave(2, -1)
    rotary = (angles.cos(), angles.sin())
    ours = DenseAttention(query_spans(sequence, 3))(attention, x, rotary_emb=rotary)
    stock = WanAttnProcessor()(attention, x, attention_mask=mask, rotary_emb=rotary)
    assert relative(ours, stock) < TOLERANCE


def test_a_layout_equals_the_stock_transformer_under_the_mask(transformer, layout, inputs):
    velocity = velocity_of(transformer, layout, inputs)
    mask = attention_mask(layout.slots)
    mask = mask.repeat_interleave(TOKENS_PER_FRAME, 0).repeat_interleave(TOKENS_PER_FRAME, 1)
    for block in transformer.blocks:
        block.attn1.set_processor(MaskedAttention(mask))
    transformer.rope = CleanAndNoisyRope(transformer.rope, (CHUNKS - 1) * CHUNK)
    with torch.no_grad():
        stock = causal_velocity(transformer, **inputs)
    assert relative(velocity, stock) < TOLERANCE


def test_the_lean_forward_equals_the_layout_and_its_gradients(transformer, layout, inputs):
    sigmas = nn.functional.pad(1000 * inputs["sigmas"], ((CHUNKS - 1) * CHUNK, 0))
    latents = torch.cat([inputs["clean"], inputs["noisy"]], 2)
    with layout.applied_to(transformer, first=7):
        velocity = causal_velocity(transformer, **inputs)
        lean = lean_velocity(
            transformer, latents, sigmas, inputs["embeddings"], spans=layout.self_attention.spans
        )[:, :, (CHUNKS - 1) * CHUNK :]
    assert relative(lean.detach(), velocity.detach()) < TOLERANCE
    weight = transformer.blocks[0].attn1.to_q.weight
    ours, theirs = (torch.autograd.grad(v.square().sum(), weight)[0] for v in (lean, velocity))
    assert relative(ours, theirs) < 10 * TOLERANCE


@torch.no_grad()
def test_without_slots_the_stock_transformer_is_unchanged(transformer, inputs):
    call = (inputs["noisy"], torch.tensor([900.0, 100.0]), inputs["embeddings"])
    stock = transformer(*call).sample
    with Layout(None, tokens_per_frame=TOKENS_PER_FRAME).applied_to(transformer):
        ours = transformer(*call).sample
    assert relative(ours, stock) < TOLERANCE
    lean = lean_velocity(transformer, call[0], call[1][:, None], call[2])
    assert relative(lean, stock) < TOLERANCE


@torch.no_grad()
def test_the_transformer_is_restored_after_an_error(transformer, layout, inputs):
    call = (inputs["noisy"], torch.tensor([900.0, 100.0]), inputs["embeddings"])
    before, processors, rope = (
        transformer(*call).sample,
        transformer.attn_processors,
        transformer.rope,
    )
    with pytest.raises(KeyboardInterrupt), layout.applied_to(transformer):
        raise KeyboardInterrupt
    assert transformer.rope is rope
    assert transformer.attn_processors == processors
    assert torch.equal(transformer(*call).sample, before)


@pytest.mark.parametrize("chunk", range(1, CHUNKS))
def test_an_earlier_chunk_does_not_depend_on_a_later_one(transformer, layout, inputs, draw, chunk):
    edge = chunk * CHUNK
    noisy, clean, sigmas = (inputs[name].clone() for name in ("noisy", "clean", "sigmas"))
    noisy[:, :, edge:] = draw(*noisy[:, :, edge:].shape)
    clean[:, :, edge:] = draw(*clean[:, :, edge:].shape)
    sigmas[:, edge:] = 0.33
    before = velocity_of(transformer, layout, inputs)
    after = velocity_of(transformer, layout, inputs, noisy=noisy, clean=clean, sigmas=sigmas)
    assert torch.equal(after[:, :, :edge], before[:, :, :edge])
    assert not torch.equal(after[:, :, edge:], before[:, :, edge:])


def test_noisy_chunks_do_not_depend_on_each_other(transformer, layout, inputs, draw):
    noisy = inputs["noisy"].clone()
    noisy[:, :, :CHUNK] = draw(*noisy[:, :, :CHUNK].shape)
    before = velocity_of(transformer, layout, inputs)
    after = velocity_of(transformer, layout, inputs, noisy=noisy)
    assert torch.equal(after[:, :, CHUNK:], before[:, :, CHUNK:])


def test_every_later_chunk_depends_on_the_clean_past(transformer, layout, inputs, draw):
    clean = inputs["clean"].clone()
    clean[:, :, :CHUNK] = draw(*clean[:, :, :CHUNK].shape)
    before = velocity_of(transformer, layout, inputs)
    after = velocity_of(transformer, layout, inputs, clean=clean)
    differences = (after - before).abs().amax((0, 1, 3, 4)).unflatten(0, (-1, CHUNK)).amax(1)
    assert differences[0] == 0
    assert (differences[1:] > 1e-3).all()


def test_a_single_chunk_equals_that_chunk_of_the_whole_layout(transformer, layout, inputs):
    together = velocity_of(transformer, layout, inputs)
    for chunk in range(CHUNKS):
        now = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        single = Layout(
            slots(clean=chunk, noisy=range(chunk, chunk + 1), chunk=CHUNK),
            tokens_per_frame=TOKENS_PER_FRAME,
        )
        velocity = velocity_of(
            transformer,
            single,
            inputs,
            clean=inputs["clean"][:, :, : now.start],
            noisy=inputs["noisy"][:, :, now],
            sigmas=inputs["sigmas"][:, now],
        )
        assert relative(velocity, together[:, :, now]) < TOLERANCE


def test_only_relative_positions_matter(transformer, layout, inputs):
    here = velocity_of(transformer, layout, inputs)
    with torch.no_grad(), layout.applied_to(transformer, first=40):
        shifted = causal_velocity(transformer, **inputs)
    assert relative(shifted, here) < TOLERANCE
