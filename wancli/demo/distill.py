"""Distill the demo into four steps without guidance: a LoRA, by consistency distillation.

Consistency models (arXiv:2303.01469) of a guided teacher (LCM, arXiv:2310.04378), as a LoRA
(arXiv:2311.05556): the clean prediction is trained to stay the same along a step of the guided
solver. Half of the causal steps use the student's own rollouts of many chunks, so that it learns to
continue its own output (Self-Forcing, arXiv:2506.08009).
"""

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from wancli.demo.causal import Layout, causal_velocity, slots
from wancli.demo.dataset import Dataset
from wancli.demo.parts import CHUNK
from wancli.demo.training import Log, batches, load_checkpoint, rate, save_checkpoint
from wancli.demo.transformer import (
    BATCH,
    CAUSAL_SHARE,
    FRAMES,
    SHIFT,
    Batch,
    DemoModel,
    TrainingForward,
    by_frame,
    draw_batch,
    draw_times,
    to_sigmas,
)
from wancli.demo.world import Combination, describe
from wancli.generation.flow import few_step, few_step_levels, guide

RANK = 16
GUIDANCE = 2.5  # of the teacher; distilled into the student
SOLVER_STEPS = 20  # of the teacher
TIMESTEPS = (1000, 750, 500, 250)
ROLLOUT_SHARE = 0.5  # of the causal steps
MAX_CHUNKS = 12  # of one rollout of the student
RATE = 1e-3
EMA = 0.98
SOFT = 0.03  # pseudo-Huber: quadratic below, linear above


class TrainableLora:
    """A LoRA on all linear layers of a transformer's blocks: weight = base + up @ down."""

    def __init__(self, transformer: WanTransformer3DModel) -> None:
        transformer.requires_grad_(requires_grad=False)
        self.layers = {
            f"blocks.{name}": layer
            for name, layer in transformer.blocks.named_modules()
            if isinstance(layer, nn.Linear)
        }
        generator = torch.Generator().manual_seed(3)
        self.base, self.factors = dict[str, Tensor](), dict[str, nn.Parameter]()
        for name, layer in self.layers.items():
            weight = layer.weight.requires_grad_()
            down = torch.randn(RANK, weight.shape[1], generator=generator) / RANK**0.5
            up = torch.zeros(weight.shape[0], RANK)
            self.base[name] = weight.detach().clone()
            self.factors[f"{name}.lora_A.weight"] = nn.Parameter(down.to(weight.device))
            self.factors[f"{name}.lora_B.weight"] = nn.Parameter(up.to(weight.device))

    def _pairs(self) -> Iterator[tuple[nn.Linear, Tensor, nn.Parameter, nn.Parameter]]:
        for name, layer in self.layers.items():
            down, up = (self.factors[f"{name}.lora_{which}.weight"] for which in "AB")
            yield layer, self.base[name], down, up

    @torch.no_grad()
    def merge(self) -> None:
        """Write base + up @ down into the transformer."""
        for layer, base, down, up in self._pairs():
            layer.weight.copy_(base + up @ down)

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Turn the gradients of the merged matrices into gradients of the factors."""
        for layer, _, down, up in self._pairs():
            gradient, layer.weight.grad = layer.weight.grad, None
            if gradient is not None:
                up.grad, down.grad = gradient @ down.T, up.T @ gradient

    def state_dict(self) -> dict[str, Tensor]:
        """The factors, in diffusers' naming."""
        return {name: factor.detach() for name, factor in self.factors.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the factors and merge them."""
        for name, factor in self.factors.items():
            factor.copy_(state[name])
        self.merge()


@dataclass
class Rollouts:
    """Videos that the student extends, chunk after chunk."""

    prompts: list[str]
    latents: Tensor  # [B, C, F, H, W], at most the last FRAMES latent frames
    first: int = 0  # index of the first of them

    @property
    def end(self) -> int:
        """Index of the next latent frame."""
        return self.first + self.latents.shape[2]


def start_rollouts(scenes: Sequence[Combination], seed: int, like: Tensor) -> Rollouts:
    """Empty rollouts with new prompts, of the shape of `like` [B, C, F, H, W]."""
    rng = random.Random(seed)
    prompts = [describe(rng.choice(scenes), rng) for _ in range(len(like))]
    return Rollouts(prompts, like[:, :, :0])


@dataclass
class Distillation:
    """Student, teacher, and their forwards."""

    student: WanTransformer3DModel
    teacher: WanTransformer3DModel
    text_encoder: Any
    forward: TrainingForward
    tokens_per_frame: int

    def __post_init__(self) -> None:
        self.levels = few_step_levels(TIMESTEPS, shift=SHIFT, warp=True)
        self.next_chunk = [
            Layout(
                slots(clean=past, noisy=range(past, past + 1), chunk=CHUNK),
                tokens_per_frame=self.tokens_per_frame,
            )
            for past in range(FRAMES // CHUNK)
        ]

    @torch.no_grad()
    def extend(self, rollouts: Rollouts, seed: int) -> Rollouts:
        """Append a chunk by the student, as in inference: a few steps from pure noise."""
        text = self.forward.embed_prompts(self.text_encoder, rollouts.prompts)
        context = rollouts.latents[:, :, CHUNK - FRAMES :]
        layout = self.next_chunk[context.shape[2] // CHUNK]
        generator = torch.Generator().manual_seed(seed)
        shape = (*context.shape[:2], CHUNK, *context.shape[3:])

        def velocity(latents: Tensor, timestep: float) -> Tensor:
            sigmas = torch.full((len(latents), CHUNK), timestep / 1000, device=latents.device)
            first = rollouts.end - context.shape[2]
            with (
                torch.autocast(latents.device.type, dtype=torch.bfloat16),
                layout.applied_to(self.student, first=first),
            ):
                return causal_velocity(self.student, context, latents, sigmas, text).float()

        *_, last = few_step(
            velocity,
            lambda _: torch.randn(shape, generator=generator).to(context.device),
            self.levels,
        )
        latents = torch.cat([rollouts.latents, last.latents], 2)[:, :, -FRAMES:]
        return replace(rollouts, latents=latents, first=rollouts.end + CHUNK - latents.shape[2])

    def loss(self, batch: Batch) -> Tensor:
        """Consistency loss: change of the clean prediction along one step of the guided teacher."""
        nearer = replace(batch, times=batch.times - 1 / SOLVER_STEPS)
        sigmas, after = (by_frame(to_sigmas(at.times)) for at in (batch, nearer))
        noisy = batch.noisy()
        with torch.no_grad():
            text, empty = (
                self.forward.embed_prompts(self.text_encoder, prompts)
                for prompts in (batch.prompts, [""] * len(batch.prompts))
            )
            cond, uncond = (
                self.forward.velocity(self.teacher, batch, noisy, embeddings).float()
                for embeddings in (text, empty)
            )
            stepped = noisy + (after - sigmas) * guide(cond, uncond, GUIDANCE)
            velocity = self.forward.velocity(self.student, nearer, stepped, text)
            target = stepped - after * velocity.float()
        ours = noisy - sigmas * self.forward.velocity(self.student, batch, noisy, text).float()
        error = (ours - target)[:, :, batch.masked :]
        return ((error.square() + SOFT**2).sqrt() - SOFT).mean()


def rollout_batch(rollouts: Rollouts, seed: int) -> Batch:
    """A causal batch of the student's rollouts."""
    generator, clean = torch.Generator().manual_seed(seed), rollouts.latents
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    times = draw_times(len(clean), generator, causal=True).to(clean.device)
    return Batch(
        rollouts.prompts, clean, noise, times, clean[:, :, :-CHUNK],
        offset=rollouts.first, masked=CHUNK if rollouts.first else 0,
    )  # fmt: skip


def snap_to_solver(batch: Batch) -> Batch:
    """Round the batch's times up to the teacher's steps."""
    return replace(batch, times=(batch.times * SOLVER_STEPS).ceil() / SOLVER_STEPS)


def distill(
    work: Path, model: DemoModel, data: Dataset, *, steps: int, device: str = "cpu"
) -> dict[str, Tensor]:
    """Train or resume; returns the averaged LoRA. `work` holds checkpoint and curve."""
    teacher = model.transformer.to(device).eval()
    student = copy.deepcopy(teacher)
    rows, columns = data.latents.shape[-2:]
    tokens_per_frame = rows * columns // 4
    forward = TrainingForward(tokens_per_frame=tokens_per_frame, device=device)
    text_encoder = model.text_encoder.to(device)
    distillation = Distillation(student, teacher, text_encoder, forward, tokens_per_frame)
    lora = TrainableLora(student)
    optimizer = torch.optim.AdamW(lora.factors.values(), lr=RATE, weight_decay=0.0)
    average = {name: factor.clone() for name, factor in lora.state_dict().items()}
    some = data.latents[:1].expand(BATCH, -1, -1, -1, -1).to(device)
    rollouts = start_rollouts(data.scenes, 0, some)
    log, path, first = Log(work / "distill.jsonl"), work / "distill.pt", 0
    if state := load_checkpoint(path):
        lora.load_state_dict(state["lora"])
        optimizer.load_state_dict(state["optimizer"])
        average, rollouts, first = state["average"], Rollouts(**state["rollouts"]), state["step"]
    for step, seed in batches(first, steps):
        batch = draw_batch(data, seed, causal_share=CAUSAL_SHARE, device=device)
        own = batch.causal and random.Random(seed + 1).random() < ROLLOUT_SHARE
        if own:
            if rollouts.end >= MAX_CHUNKS * CHUNK:
                rollouts = start_rollouts(data.scenes, seed, some)
            rollouts = distillation.extend(rollouts, seed + 2)
            while rollouts.latents.shape[2] < FRAMES:
                rollouts = distillation.extend(rollouts, seed + 2 + rollouts.end)
            batch = rollout_batch(rollouts, seed)
        loss = distillation.loss(snap_to_solver(batch))
        loss.backward()  # type: ignore[no-untyped-call]
        lora.collect_gradients()
        nn.utils.clip_grad_norm_(lora.factors.values(), 1.0)
        optimizer.param_groups[0]["lr"] = RATE * rate(step, steps, hold=0.4)
        optimizer.step()
        lora.merge()
        keep = min(EMA, (1 + step) / (10 + step))
        for name, factor in lora.state_dict().items():
            average[name].lerp_(factor, 1 - keep)
        log.write(step=step, causal=batch.causal, own=own, loss=loss.item())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            save_checkpoint(
                path, lora=lora.state_dict(), optimizer=optimizer.state_dict(), average=average,
                rollouts=vars(rollouts), step=step + 1,
            )  # fmt: skip
    return average


def write_lora(lora: dict[str, Tensor], path: Path) -> None:
    """Write safetensors for `--lora`; half precision, under 1 MB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    halves = {f"transformer.{name}": t.half().contiguous().cpu() for name, t in lora.items()}
    save_file(halves, path)
