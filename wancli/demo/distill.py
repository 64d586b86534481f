"""Distill the demo into four steps without guidance: a LoRA, by consistency distillation.

Consistency models (arXiv:2303.01469), of a guided teacher (LCM, arXiv:2310.04378), as a LoRA
(arXiv:2311.05556): wherever a step of the guided solver leads, the clean prediction stays the same.
Half of the causal steps look at the student's own rollouts, which go on for many chunks, so that it
learns to go on from what it makes itself (Self-Forcing, arXiv:2506.08009).
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
    Model,
    Views,
    by_frame,
    draw_batch,
    draw_times,
    shifted,
)
from wancli.demo.world import Combination, describe
from wancli.generation.flow import few_step, few_step_levels, guide

RANK = 16
GUIDANCE = 2.5  # of the teacher; the student has it built in
SOLVER_STEPS = 20  # of the teacher
TIMESTEPS = (1000, 750, 500, 250)
OWN_SHARE = 0.5  # of the causal steps
LONGEST = 12  # chunks of an own rollout, before another begins
RATE = 1e-3
EMA = 0.98
SOFT = 0.03  # errors below count by their square, above by their size


class LowRank:
    """Corrections up @ down to the matrices of a transformer's blocks: a LoRA in training."""

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
        """Put the corrected matrices into the transformer."""
        for layer, base, down, up in self._pairs():
            layer.weight.copy_(base + up @ down)

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Of the merged matrices, to the factors."""
        for layer, _, down, up in self._pairs():
            gradient, layer.weight.grad = layer.weight.grad, None
            if gradient is not None:
                up.grad, down.grad = gradient @ down.T, up.T @ gradient

    def state_dict(self) -> dict[str, Tensor]:
        """The factors, in diffusers' naming."""
        return {name: factor.detach() for name, factor in self.factors.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state_dict`."""
        for name, factor in self.factors.items():
            factor.copy_(state[name])
        self.merge()


@dataclass
class Rollouts:
    """Videos that the student goes on with, chunk after chunk."""

    prompts: list[str]
    latents: Tensor  # [B, C, F, H, W], the last FRAMES of them
    first: int = 0  # latent frame that they begin at

    @property
    def end(self) -> int:
        """Latent frame that comes next."""
        return self.first + self.latents.shape[2]


def begin_rollouts(scenes: Sequence[Combination], seed: int, like: Tensor) -> Rollouts:
    """New prompts, and no chunk yet; `like` [B, C, F, H, W] says how large."""
    rng = random.Random(seed)
    prompts = [describe(rng.choice(scenes), rng) for _ in range(len(like))]
    return Rollouts(prompts, like[:, :, :0])


@dataclass
class Distillation:
    """Who is taught, by whom, and how they see."""

    student: WanTransformer3DModel
    teacher: WanTransformer3DModel
    text_encoder: Any
    views: Views
    tokens_per_frame: int

    def __post_init__(self) -> None:
        self.levels = few_step_levels(TIMESTEPS, shift=SHIFT, warp=True)
        self.next_chunk = [
            Layout(
                slots(clean=known, noisy=range(known, known + 1), chunk=CHUNK),
                tokens_per_frame=self.tokens_per_frame,
            )
            for known in range(FRAMES // CHUNK)
        ]

    @torch.no_grad()
    def go_on(self, rollouts: Rollouts, seed: int) -> Rollouts:
        """One more chunk by the student, as the product makes it: from pure noise, few steps."""
        text = self.views.read(self.text_encoder, rollouts.prompts)
        known = rollouts.latents[:, :, CHUNK - FRAMES :]
        layout = self.next_chunk[known.shape[2] // CHUNK]
        generator = torch.Generator().manual_seed(seed)
        shape = (*known.shape[:2], CHUNK, *known.shape[3:])

        def velocity(latents: Tensor, timestep: float) -> Tensor:
            sigmas = torch.full((len(latents), CHUNK), timestep / 1000, device=latents.device)
            first = rollouts.end - known.shape[2]
            with (
                torch.autocast(latents.device.type, dtype=torch.bfloat16),
                layout.seen_by(self.student, first=first),
            ):
                return causal_velocity(self.student, known, latents, sigmas, text).float()

        *_, last = few_step(
            velocity,
            lambda _: torch.randn(shape, generator=generator).to(known.device),
            self.levels,
        )
        latents = torch.cat([rollouts.latents, last.latents], 2)[:, :, -FRAMES:]
        return replace(rollouts, latents=latents, first=rollouts.end + CHUNK - latents.shape[2])

    def error(self, batch: Batch) -> Tensor:
        """How far the student's clean prediction moves along one step of the guided teacher."""
        nearer = replace(batch, times=batch.times - 1 / SOLVER_STEPS)
        sigmas, after = (by_frame(shifted(at.times)) for at in (batch, nearer))
        noisy = batch.noisy()
        with torch.no_grad():
            text, nothing = (
                self.views.read(self.text_encoder, prompts)
                for prompts in (batch.prompts, [""] * len(batch.prompts))
            )
            cond, uncond = (
                self.views.velocity(self.teacher, batch, noisy, told).float()
                for told in (text, nothing)
            )
            stepped = noisy + (after - sigmas) * guide(cond, uncond, GUIDANCE)
            velocity = self.views.velocity(self.student, nearer, stepped, text)
            target = stepped - after * velocity.float()
        ours = noisy - sigmas * self.views.velocity(self.student, batch, noisy, text).float()
        error = (ours - target)[:, :, batch.unjudged :]
        return ((error.square() + SOFT**2).sqrt() - SOFT).mean()


def own_batch(rollouts: Rollouts, seed: int) -> Batch:
    """A causal batch of what the student made."""
    generator, clean = torch.Generator().manual_seed(seed), rollouts.latents
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    times = draw_times(len(clean), generator, causal=True).to(clean.device)
    return Batch(
        rollouts.prompts, clean, noise, times, clean[:, :, :-CHUNK],
        offset=rollouts.first, unjudged=CHUNK if rollouts.first else 0,
    )  # fmt: skip


def on_solver_steps(batch: Batch) -> Batch:
    """The batch at the times of the teacher's solver."""
    return replace(batch, times=(batch.times * SOLVER_STEPS).ceil() / SOLVER_STEPS)


def distill(
    work: Path, model: Model, data: Dataset, *, steps: int, device: str = "cpu"
) -> dict[str, Tensor]:
    """Train, or go on training; returns the averaged LoRA. `work` holds checkpoint and curve."""
    teacher = model.transformer.to(device).eval()
    student = copy.deepcopy(teacher)
    rows, columns = data.latents.shape[-2:]
    tokens_per_frame = rows * columns // 4
    views = Views(tokens_per_frame=tokens_per_frame, device=device)
    text_encoder = model.text_encoder.to(device)
    job = Distillation(student, teacher, text_encoder, views, tokens_per_frame)
    lora = LowRank(student)
    optimizer = torch.optim.AdamW(lora.factors.values(), lr=RATE, weight_decay=0.0)
    average = {name: factor.clone() for name, factor in lora.state_dict().items()}
    some = data.latents[:1].expand(BATCH, -1, -1, -1, -1).to(device)
    rollouts = begin_rollouts(data.scenes, 0, some)
    log, path, first = Log(work / "distill.jsonl"), work / "distill.pt", 0
    if state := load_checkpoint(path):
        lora.load_state_dict(state["lora"])
        optimizer.load_state_dict(state["optimizer"])
        average, rollouts, first = state["average"], Rollouts(**state["rollouts"]), state["step"]
    for step, seed in batches(first, steps):
        batch = draw_batch(data, seed, causal_share=CAUSAL_SHARE, device=device)
        own = batch.causal and random.Random(seed + 1).random() < OWN_SHARE
        if own:
            if rollouts.end >= LONGEST * CHUNK:
                rollouts = begin_rollouts(data.scenes, seed, some)
            rollouts = job.go_on(rollouts, seed + 2)
            while rollouts.latents.shape[2] < FRAMES:
                rollouts = job.go_on(rollouts, seed + 2 + rollouts.end)
            batch = own_batch(rollouts, seed)
        loss = job.error(on_solver_steps(batch))
        loss.backward()  # type: ignore[no-untyped-call]
        lora.take_gradients()
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
    """As safetensors that `--lora` takes; half precision, under 1 MB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    halves = {f"transformer.{name}": t.half().contiguous().cpu() for name, t in lora.items()}
    save_file(halves, path)
