"""Train the demo's transformer and text encoder: bidirectional and causal steps, flow matching.

velocity = noise - clean; sigmas are uniform, then shifted by 3. A bidirectional step has one sigma
per clip (`generate`), a causal one a sigma per chunk, next to the clean chunks (`rollout`). The
sigmas of a batch are stratified over their range, which lowers the variance of the gradient.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from wancli.demo.causal import Layout, causal_velocity, slots
from wancli.demo.dataset import Dataset
from wancli.demo.lean import HalfCopy, lean_velocity
from wancli.demo.parts import (
    CHUNK,
    embed,
    make_text_encoder,
    make_tokenizer,
    make_transformer,
    tokenize,
)
from wancli.demo.training import (
    Average,
    CapturedStep,
    Feed,
    Log,
    Optimizer,
    batches,
    clear_gradients,
    is_checkpoint,
    load_checkpoint,
    rate,
    save_checkpoint,
)
from wancli.demo.world import describe
from wancli.generation.flow import add_noise

FRAMES = 9  # latent frames of a clip
BATCH = 16
SHIFT = 3.0
CAUSAL_SHARE = 0.5
EMA = 0.999
CONTEXT_NOISE = 0.1  # maximum: the context of a rollout is never quite clean


class DemoModel(nn.Module):
    """Transformer and text encoder, which are trained together."""

    def __init__(self, transformer: WanTransformer3DModel, text_encoder: UMT5EncoderModel) -> None:
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder


def train_transformer(
    work: Path,
    data: Dataset,
    *,
    steps: int,
    clips: int = BATCH,
    device: str = "cpu",
    compile_blocks: bool = True,
) -> DemoModel:
    """Train or resume; returns the averaged weights. `work` holds checkpoint and curve.

    `compile_blocks` is for a CPU; on CUDA, the lean forward is captured.
    """
    data = replace(data, latents=data.latents.to(device))
    forward = TrainingForward(tokens_per_frame=data.tokens_per_frame, device=device)
    model = DemoModel(make_transformer(), make_text_encoder(len(forward.tokenizer))).to(device)
    optimizer = _optimizer(model)
    log, path, first = Log(work / "transformer.jsonl"), work / "transformer.pt", 0
    average = Average(model.state_dict(), decay=EMA)
    if state := load_checkpoint(path):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.load(state["average"])
        first = state["step"]
    compute_gradients = forward.gradients(model)
    if compile_blocks and not forward.lean:
        model.transformer.compile_repeated_blocks(dynamic=False)

    def train_step(*tensors: Tensor, masked: int) -> Tensor:
        loss = compute_gradients(Batch.of(tensors, masked))
        optimizer.step()
        average.update(model.state_dict())
        return loss

    draw = partial(
        draw_batch, data, causal_share=CAUSAL_SHARE, clips=clips, tokenizer=forward.tokenizer
    )
    captured, feed = CapturedStep(train_step, device=device), Feed(device)
    for step, seed in batches(first, steps):
        batch = feed(partial(draw, seed))
        optimizer.set_rate(rate(step, steps, hold=0.4))
        average.set_step(step)
        loss = captured(*batch, masked=batch.masked)
        log.collect({"step": step, "clips": clips, "causal": batch.causal}, loss)
        if is_checkpoint(step + 1, steps, every=250):
            log.flush()
            save_checkpoint(
                path, model=model.state_dict(), average=average.tensors, step=step + 1,
                optimizer=optimizer.state_dict(),
            )  # fmt: skip
    model.load_state_dict(average.tensors)
    return model.eval()


@dataclass
class Batch:
    """Data of one training step: clips, noise and sigmas. Iterates over its tensors."""

    ids: Tensor  # tokens of the prompts, [B, TEXT_LENGTH]
    mask: Tensor
    clean: Tensor  # [B, C, F, H, W]
    noise: Tensor
    times: Tensor  # [B, F] in (0, 1]: sigmas before the shift
    offset: Tensor  # [], index of the first latent frame
    context: Tensor | None = None  # [B, C, F - CHUNK, H, W] in a causal step: past chunks
    masked: int = 0  # first latent frames that are excluded from the loss

    @classmethod
    def of(cls, tensors: Iterable[Tensor], masked: int) -> "Batch":
        """The batch that iterates over these tensors."""
        names = [field.name for field in fields(cls)]
        return cls(**dict(zip(names, tensors, strict=False)), masked=masked)

    def __iter__(self) -> Iterator[Tensor]:
        tensors = (self.ids, self.mask, self.clean, self.noise, self.times, self.offset)
        return iter(tensors if self.context is None else (*tensors, self.context))

    @property
    def causal(self) -> bool:
        """Whether chunks attend only to earlier ones."""
        return self.context is not None

    def noisy(self) -> Tensor:
        """Noisy latents [B, C, F, H, W]."""
        return add_noise(self.clean, self.noise, by_frame(to_sigmas(self.times)))

    def loss(self, velocity: Tensor) -> Tensor:
        """Mean squared error of velocity [B, C, F, H, W], without masked latent frames."""
        error = velocity.float() - (self.noise - self.clean)
        return error[:, :, self.masked :].square().mean()


def draw_batch(
    data: Dataset, seed: int, *, causal_share: float, clips: int, tokenizer: Any
) -> Batch:
    """Draw a batch of the data set from `seed`, on the device of its latents."""
    rng, generator = random.Random(seed), torch.Generator(data.latents.device).manual_seed(seed)
    causal = rng.random() < causal_share
    # The VAE's first latent frame is special, and is no longer in a window that has rolled.
    start = rng.choice((0, 0, 1, 2, 3)) if causal else 0
    chosen = [rng.randrange(len(data.scenes)) for _ in range(clips)]
    prompts = [describe(data.scenes[i], rng) for i in chosen]
    clean = data.latents[chosen][:, :, start : start + FRAMES]
    noise = draw_noise(clean.shape, generator)
    times = draw_times(clips, generator, causal=causal)
    context = add_context_noise(clean[:, :, :-CHUNK], generator) if causal else None
    offset = start + rng.randint(0, 60) if start else 0
    ids, mask = (t.to(clean.device) for t in tokenize(tokenizer, prompts))
    return Batch(
        ids, mask, clean, noise, times, torch.full((), offset, device=clean.device), context,
        # RoPE is relative: a chunk without context looks the same wherever it is from, so only
        # real beginnings may train the first chunk.
        masked=CHUNK if start else 0,
    )  # fmt: skip


def draw_noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal noise, on the device of the generator."""
    return torch.randn(*shape, generator=generator, device=generator.device)


def draw_times(clips: int, generator: torch.Generator, *, causal: bool) -> Tensor:
    """Stratified times [clips, FRAMES] over (0, 1], one per clip or, if causal, per chunk."""
    chunks, device = FRAMES // CHUNK if causal else 1, generator.device
    order = torch.stack(
        [torch.randperm(clips, generator=generator, device=device) for _ in range(chunks)], 1
    )
    draws = torch.rand(clips, chunks, generator=generator, device=device)
    return ((order + 1 - draws) / clips).repeat_interleave(FRAMES // chunks, 1)


def add_context_noise(clean: Tensor, generator: torch.Generator) -> Tensor:
    """Mix up to CONTEXT_NOISE of noise into [B, C, F, H, W]."""
    share = torch.rand(len(clean), 1, 1, 1, 1, generator=generator, device=clean.device)
    return clean + CONTEXT_NOISE * share * draw_noise(clean.shape, generator)


def to_sigmas(times: Tensor) -> Tensor:
    """Shift times to sigmas."""
    return SHIFT * times / (1 + (SHIFT - 1) * times)


def by_frame(values: Tensor) -> Tensor:
    """View [B, F] as [B, 1, F, 1, 1]."""
    return values[:, None, :, None, None]


@dataclass(frozen=True)
class Placement:
    """Where noisy latents are: their layout, first latent frame [] and past chunks."""

    layout: Layout
    first: Tensor
    context: Tensor | None = None  # [B, C, F, H, W]


class TrainingForward:
    """Forwards in training: prompt embeddings, and bidirectional or causal velocity.

    `lean` ones are for CUDA, on models that HalfCopy made. Otherwise they are diffusers' own, under
    autocast.
    """

    def __init__(self, *, tokens_per_frame: int, device: str, lean: bool | None = None) -> None:
        self.tokenizer, self.device = make_tokenizer(), device
        self.tokens_per_frame = tokens_per_frame
        self.lean = device != "cpu" if lean is None else lean
        chunks = FRAMES // CHUNK
        causal = slots(clean=chunks - 1, noisy=range(chunks), chunk=CHUNK)
        self.layouts = {
            False: Layout(None, tokens_per_frame=tokens_per_frame, device=device),
            True: Layout(causal, tokens_per_frame=tokens_per_frame, device=device),
        }

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens and mask of prompts on the device."""
        ids, mask = tokenize(self.tokenizer, prompts)
        return ids.to(self.device), mask.to(self.device)

    def embed(self, text_encoder: UMT5EncoderModel, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings [B, TEXT_LENGTH, TEXT_DIM] of tokens."""
        with self._autocast():
            return embed(text_encoder, ids, mask)

    def gradients(self, model: DemoModel) -> Callable[[Batch], Tensor]:
        """A function that sets the gradients of a batch's loss, and returns the loss."""
        half = HalfCopy(model, enabled=self.lean)

        def compute(batch: Batch) -> Tensor:
            clear_gradients(model.parameters())
            half.refresh()
            text = self.embed(half.model.text_encoder, batch.ids, batch.mask)
            loss = batch.loss(self.velocity(half.model.transformer, batch, batch.noisy(), text))
            loss.backward()  # type: ignore[no-untyped-call]
            half.collect_gradients()
            return loss.detach()

        return compute

    def velocity(self, transformer: Any, batch: Batch, noisy: Tensor, text: Tensor) -> Tensor:
        """Velocity [B, C, F, H, W] of noisy latents at the batch's sigmas."""
        place = Placement(self.layouts[batch.causal], batch.offset, batch.context)
        return self.velocity_at(transformer, noisy, to_sigmas(batch.times), text, place)

    def velocity_at(
        self, transformer: Any, noisy: Tensor, sigmas: Tensor, text: Tensor, place: Placement
    ) -> Tensor:
        """Velocity [B, C, F, H, W] of noisy latents at sigmas [B, F], one per latent frame."""
        layout, context = place.layout, place.context
        with self._autocast(), layout.applied_to(transformer, first=place.first):
            if self.lean:
                return _lean_velocity(transformer, noisy, sigmas, text, place)
            if context is not None:
                return causal_velocity(transformer, context, noisy, sigmas, text)
            out: Tensor = transformer(noisy, 1000 * sigmas[:, 0], text, return_dict=False)[0]
            return out

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=not self.lean)


def _lean_velocity(
    transformer: Any, noisy: Tensor, sigmas: Tensor, text: Tensor, place: Placement
) -> Tensor:
    spans = place.layout.self_attention.spans
    if place.context is None:
        return lean_velocity(transformer, noisy, 1000 * sigmas[:, :1], text, spans=spans)
    past = place.context.shape[2]
    latents = torch.cat([place.context, noisy], 2)
    timesteps = nn.functional.pad(1000 * sigmas, (past, 0))
    return lean_velocity(transformer, latents, timesteps, text, spans=spans)[:, :, past:]


def _optimizer(model: DemoModel) -> Optimizer:
    blocks = [*model.transformer.blocks.parameters()]
    matrices = [p for p in blocks if p.ndim == 2]
    matrix_ids = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in matrix_ids]
    return Optimizer(matrices, rest, muon_lr=0.02, adam_lr=2e-3)
