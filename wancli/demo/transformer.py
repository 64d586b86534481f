"""Train the demo's transformer and text encoder: bidirectional and causal steps, flow matching.

velocity = noise - clean; sigmas uniform, then shifted by 3. A bidirectional step has one sigma a
clip (`generate`), a causal one a sigma a chunk, beside the clean chunks (`rollout`).
"""

import random
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

FRAMES = 9  # latent frames of a clip
BATCH = 16
SHIFT = 3.0
EMA = 0.999
CONTEXT_NOISE = 0.1  # at most: a rollout's own past is never quite clean


class Model(nn.Module):
    """What is trained together."""

    def __init__(self, transformer: WanTransformer3DModel, text_encoder: UMT5EncoderModel) -> None:
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder


def train_transformer(
    work: Path, data: Dataset, *, steps: int, device: str = "cpu", compile_blocks: bool = True
) -> Model:
    """Train, or go on training; returns the averaged weights. `work` holds checkpoint and curve."""
    tokenizer = make_tokenizer()
    model = Model(make_transformer(), make_text_encoder(len(tokenizer))).to(device)
    optimizer = _optimizer(model)
    log, path, first = Log(work / "transformer.jsonl"), work / "transformer.pt", 0
    average = {k: v.clone() for k, v in model.state_dict().items()}
    if state := load_checkpoint(path):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, first = state["average"], state["step"]
    if compile_blocks:
        model.transformer.compile_repeated_blocks(dynamic=False)
    per_frame = data.latents.shape[-1] * data.latents.shape[-2] // 4
    chunks = FRAMES // CHUNK
    layouts = {
        False: Layout(None, tokens_per_frame=per_frame),
        True: Layout(
            slots(clean=chunks - 1, noisy=range(chunks), chunk=CHUNK), tokens_per_frame=per_frame
        ),
    }
    for step, seed in batches(first, steps):
        batch = Batch(data, seed, causal_share=0.3 if step < 0.6 * steps else 0.5, device=device)
        ids, mask = tokenize(tokenizer, batch.prompts)
        with torch.autocast(device, dtype=torch.bfloat16):
            embeddings = embed(model.text_encoder, ids.to(device), mask.to(device))
            with layouts[batch.causal].seen_by(model.transformer, first=batch.offset):
                velocity = batch.velocity(model.transformer, embeddings)
        error = velocity.float() - (batch.noise - batch.clean)
        loss = error[:, :, batch.unjudged :].square().mean()
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


class Batch:
    """One training step's data, all of it drawn from `seed`."""

    def __init__(self, data: Dataset, seed: int, *, causal_share: float, device: str) -> None:
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.causal = rng.random() < causal_share
        # The first latent frame of a VAE is special, and a window that has rolled never sees it.
        start = rng.choice((0, 0, 1, 2, 3)) if self.causal else 0
        self.offset = start + rng.randint(0, 60) if start else 0
        # RoPE knows only distances: a first chunk without a past looks the same wherever it is
        # from, so only true beginnings may teach what a beginning looks like.
        self.unjudged = CHUNK if start else 0  # latent frames
        chosen = [rng.randrange(len(data.scenes)) for _ in range(BATCH)]
        self.prompts = [describe(data.scenes[i], rng) for i in chosen]
        self.clean = data.latents[chosen][:, :, start : start + FRAMES].to(device)
        self.noise = torch.randn(self.clean.shape, generator=generator).to(device)
        draws = torch.rand(BATCH, FRAMES // CHUNK if self.causal else 1, generator=generator)
        sigmas = SHIFT * draws / (1 + (SHIFT - 1) * draws)
        self.sigmas = sigmas.repeat_interleave(FRAMES // sigmas.shape[1], 1).to(device)  # [B, F]
        dirt = torch.rand(BATCH, 1, 1, 1, 1, generator=generator) * CONTEXT_NOISE
        self.context = self.clean[:, :, :-CHUNK]
        again = torch.randn(self.context.shape, generator=generator)
        self.context = self.context + (dirt * again).to(device)

    def velocity(self, transformer: Any, embeddings: Tensor) -> Tensor:
        """[B, C, F, H, W], predicted."""
        sigmas = self.sigmas[:, None, :, None, None]
        noisy = (1 - sigmas) * self.clean + sigmas * self.noise
        if self.causal:
            return causal_velocity(transformer, self.context, noisy, self.sigmas, embeddings)
        out: Tensor = transformer(noisy, 1000 * self.sigmas[:, 0], embeddings, return_dict=False)[0]
        return out


def _optimizer(model: Model) -> Optimizer:
    blocks = [*model.transformer.blocks.parameters()]
    matrices = [p for p in blocks if p.ndim == 2]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    return Optimizer(matrices, rest, muon_lr=0.01, adam_lr=2e-3)


@torch.no_grad()
def _follow(average: dict[str, Tensor], model: Model, keep: float) -> None:
    """Move the averaged weights towards the model's."""
    current = model.state_dict()
    names = [name for name, value in average.items() if value.is_floating_point()]
    torch._foreach_lerp_([average[n] for n in names], [current[n] for n in names], 1 - keep)
