"""Train the demo's transformer and text encoder: bidirectional and causal steps, flow matching.

velocity = noise - clean; sigmas uniform, then shifted by 3. A bidirectional step has one sigma a
clip (`generate`), a causal one a sigma a chunk, beside the clean chunks (`rollout`). A batch has
sigmas from every part of their range, which makes its gradient less a matter of chance.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from wancli.demo.causal import Layout, causal_velocity, slots
from wancli.demo.dataset import Dataset
from wancli.demo.parts import (
    CHUNK,
    embed,
    make_text_encoder,
    make_tokenizer,
    make_transformer,
    tokenize,
)
from wancli.demo.training import Log, Optimizer, batches, load_checkpoint, rate, save_checkpoint
from wancli.demo.world import describe
from wancli.generation.flow import add_noise

FRAMES = 9  # latent frames of a clip
BATCH = 16
SHIFT = 3.0
CAUSAL_SHARE = 0.5
EMA = 0.999
CONTEXT_NOISE = 0.1  # at most: a rollout's own past is never quite clean


class Model(nn.Module):
    """The modules that are trained together."""

    def __init__(self, transformer: WanTransformer3DModel, text_encoder: UMT5EncoderModel) -> None:
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder


def train_transformer(
    work: Path, data: Dataset, *, steps: int, device: str = "cpu", compile_blocks: bool = True
) -> Model:
    """Train, or go on training; returns the averaged weights. `work` holds checkpoint and curve."""
    rows, columns = data.latents.shape[-2:]
    views = Views(tokens_per_frame=rows * columns // 4, device=device)
    model = Model(make_transformer(), make_text_encoder(len(views.tokenizer))).to(device)
    optimizer = _optimizer(model)
    log, path, first = Log(work / "transformer.jsonl"), work / "transformer.pt", 0
    average = {k: v.clone() for k, v in model.state_dict().items()}
    if state := load_checkpoint(path):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, first = state["average"], state["step"]
    if compile_blocks:
        model.transformer.compile_repeated_blocks(dynamic=False)
    for step, seed in batches(first, steps):
        batch = draw_batch(data, seed, causal_share=CAUSAL_SHARE, device=device)
        text = views.read(model.text_encoder, batch.prompts)
        loss = batch.error(views.velocity(model.transformer, batch, batch.noisy(), text))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(rate(step, steps, hold=0.4))
        _follow(average, model, min(EMA, (1 + step) / (10 + step)))
        log.write(step=step, causal=batch.causal, loss=loss.item())
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save_checkpoint(
                path, model=model.state_dict(), average=average, step=step + 1,
                optimizer=optimizer.state_dict(),
            )  # fmt: skip
    model.load_state_dict(average)
    return model.eval()


@dataclass
class Batch:
    """The data of one training step: clips, noise, and how much of it."""

    prompts: list[str]
    clean: Tensor  # [B, C, F, H, W]
    noise: Tensor
    times: Tensor  # [B, F] in (0, 1]: sigmas before the shift
    context: Tensor | None = None  # [B, C, F - CHUNK, H, W] in a causal step: the chunks before
    offset: int = 0  # latent frame that the first one is at
    unjudged: int = 0  # first latent frames that teach nothing

    @property
    def causal(self) -> bool:
        """Whether chunks see only what was before them."""
        return self.context is not None

    def noisy(self) -> Tensor:
        """[B, C, F, H, W]."""
        return add_noise(self.clean, self.noise, by_frame(shifted(self.times)))

    def error(self, velocity: Tensor) -> Tensor:
        """Mean square over what is judged; velocity [B, C, F, H, W]."""
        error = velocity.float() - (self.noise - self.clean)
        return error[:, :, self.unjudged :].square().mean()


def draw_batch(data: Dataset, seed: int, *, causal_share: float, device: str) -> Batch:
    """A batch of the data set, all of it drawn from `seed`."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    causal = rng.random() < causal_share
    # The first latent frame of a VAE is special, and a window that has rolled never sees it.
    start = rng.choice((0, 0, 1, 2, 3)) if causal else 0
    chosen = [rng.randrange(len(data.scenes)) for _ in range(BATCH)]
    prompts = [describe(data.scenes[i], rng) for i in chosen]
    clean = data.latents[chosen][:, :, start : start + FRAMES]
    noise = torch.randn(clean.shape, generator=generator)
    times = draw_times(BATCH, generator, causal=causal)
    context = dirty(clean[:, :, :-CHUNK], generator).to(device) if causal else None
    return Batch(
        prompts, clean.to(device), noise.to(device), times.to(device), context,
        offset=start + rng.randint(0, 60) if start else 0,
        # RoPE knows only distances: a first chunk without a past looks the same wherever it is
        # from, so only true beginnings may teach what a beginning looks like.
        unjudged=CHUNK if start else 0,
    )  # fmt: skip


def draw_times(clips: int, generator: torch.Generator, *, causal: bool) -> Tensor:
    """[clips, FRAMES], one a clip or one a chunk, spread evenly over (0, 1]."""
    chunks = FRAMES // CHUNK if causal else 1
    order = torch.stack([torch.randperm(clips, generator=generator) for _ in range(chunks)], 1)
    times = (order + 1 - torch.rand(clips, chunks, generator=generator)) / clips
    return times.repeat_interleave(FRAMES // chunks, 1)


def dirty(clean: Tensor, generator: torch.Generator) -> Tensor:
    """[B, C, F, H, W] with up to CONTEXT_NOISE of noise."""
    share = torch.rand(len(clean), 1, 1, 1, 1, generator=generator) * CONTEXT_NOISE
    return clean + share * torch.randn(clean.shape, generator=generator)


def shifted(times: Tensor) -> Tensor:
    """Sigmas."""
    return SHIFT * times / (1 + (SHIFT - 1) * times)


def by_frame(values: Tensor) -> Tensor:
    """[B, F] as [B, 1, F, 1, 1]."""
    return values[:, None, :, None, None]


class Views:
    """The two ways of training to look at a clip, and what the text encoder makes of prompts."""

    def __init__(self, *, tokens_per_frame: int, device: str) -> None:
        self.tokenizer, self.device = make_tokenizer(), device
        chunks = FRAMES // CHUNK
        seen = slots(clean=chunks - 1, noisy=range(chunks), chunk=CHUNK)
        self.layouts = {
            False: Layout(None, tokens_per_frame=tokens_per_frame),
            True: Layout(seen, tokens_per_frame=tokens_per_frame),
        }

    def read(self, text_encoder: UMT5EncoderModel, prompts: Sequence[str]) -> Tensor:
        """[B, TEXT_LENGTH, TEXT_DIM]."""
        ids, mask = tokenize(self.tokenizer, prompts)
        with torch.autocast(self.device, dtype=torch.bfloat16):
            return embed(text_encoder, ids.to(self.device), mask.to(self.device))

    def velocity(self, transformer: Any, batch: Batch, noisy: Tensor, text: Tensor) -> Tensor:
        """[B, C, F, H, W] of noisy latents at the batch's sigmas."""
        sigmas = shifted(batch.times)
        with (
            torch.autocast(self.device, dtype=torch.bfloat16),
            self.layouts[batch.causal].seen_by(transformer, first=batch.offset),
        ):
            if batch.context is not None:
                return causal_velocity(transformer, batch.context, noisy, sigmas, text)
            out: Tensor = transformer(noisy, 1000 * sigmas[:, 0], text, return_dict=False)[0]
            return out


def _optimizer(model: Model) -> Optimizer:
    blocks = [*model.transformer.blocks.parameters()]
    matrices = [p for p in blocks if p.ndim == 2]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    return Optimizer(matrices, rest, muon_lr=0.02, adam_lr=2e-3)


@torch.no_grad()
def _follow(average: dict[str, Tensor], model: Model, keep: float) -> None:
    """Move the averaged weights towards the model's."""
    current = model.state_dict()
    names = [name for name, value in average.items() if value.is_floating_point()]
    torch._foreach_lerp_([average[n] for n in names], [current[n] for n in names], 1 - keep)
