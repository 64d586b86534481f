"""Distill the demo into four steps without guidance: a LoRA, by consistency distillation.

Consistency models (arXiv:2303.01469) of a guided teacher (LCM, arXiv:2310.04378), as a LoRA
(arXiv:2311.05556): the clean prediction at each of the four timesteps is trained to be that at the
next, which LCM skips to in one step and the guided solver here reaches in some. Half of the causal
steps use the student's own rollouts of many chunks, so that it learns to continue its own output
(Self-Forcing, arXiv:2506.08009).
"""

import copy
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from wancli.demo.causal import Layout, slots
from wancli.demo.dataset import Dataset
from wancli.demo.lean import HalfCopy
from wancli.demo.parts import CHUNK
from wancli.demo.training import (
    Adam,
    Average,
    CapturedStep,
    Feed,
    Log,
    batches,
    clear_gradients,
    is_checkpoint,
    load_checkpoint,
    rate,
    save_checkpoint,
)
from wancli.demo.transformer import (
    BATCH,
    CAUSAL_SHARE,
    FRAMES,
    SHIFT,
    Batch,
    DemoModel,
    Placement,
    TrainingForward,
    by_frame,
    draw_batch,
    draw_noise,
    draw_times,
    to_sigmas,
)
from wancli.demo.world import Combination, describe
from wancli.generation.flow import few_step, few_step_levels, guide

RANK = 16
GUIDANCE = 2.5  # of the teacher; distilled into the student
TIMESTEPS = (1000, 750, 500, 250)
SOLVER_STEPS = 5  # of the teacher, from one of these to the next
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

    ids: Tensor  # tokens of the prompts, [B, TEXT_LENGTH]
    mask: Tensor
    latents: Tensor  # [B, C, F, H, W], at most the last FRAMES latent frames
    first: int = 0  # index of the first of them

    @property
    def end(self) -> int:
        """Index of the next latent frame."""
        return self.first + self.latents.shape[2]


def start_rollouts(
    scenes: Sequence[Combination], seed: int, like: Tensor, forward: TrainingForward
) -> Rollouts:
    """Empty rollouts with new prompts, of the shape of `like` [B, C, F, H, W]."""
    rng = random.Random(seed)
    prompts = [describe(rng.choice(scenes), rng) for _ in range(len(like))]
    return Rollouts(*forward.tokenize(prompts), like[:, :, :0])


@dataclass
class Distillation:
    """Student, teacher, and their forwards."""

    student: WanTransformer3DModel
    teacher: WanTransformer3DModel
    text_encoder: Any
    forward: TrainingForward

    def __post_init__(self) -> None:
        self.levels = few_step_levels(TIMESTEPS, shift=SHIFT, warp=True)
        self.next_chunk = [
            Layout(
                slots(clean=past, noisy=range(past, past + 1), chunk=CHUNK),
                tokens_per_frame=self.forward.tokens_per_frame,
                device=self.forward.device,
            )
            for past in range(FRAMES // CHUNK)
        ]
        self._empty = self.forward.tokenize([""])
        self._render = CapturedStep(self.render_chunk, device=self.forward.device)

    def extend(self, rollouts: Rollouts, seed: int) -> Rollouts:
        """Append a chunk by the student, as in inference: a few steps from pure noise."""
        context = rollouts.latents[:, :, CHUNK - FRAMES :]
        generator = torch.Generator(context.device).manual_seed(seed)
        shape = (len(self.levels), *context.shape[:2], CHUNK, *context.shape[3:])
        first = torch.full((), rollouts.end - context.shape[2], device=context.device)
        chunk = self._render(
            rollouts.ids, rollouts.mask, context, draw_noise(shape, generator), first
        )
        latents = torch.cat([rollouts.latents, chunk], 2)[:, :, -FRAMES:]
        return replace(rollouts, latents=latents, first=rollouts.end + CHUNK - latents.shape[2])

    @torch.no_grad()
    def render_chunk(
        self, ids: Tensor, mask: Tensor, context: Tensor, noise: Tensor, first: Tensor
    ) -> Tensor:
        """The student's chunk after the context [B, C, F, H, W], from one noise per step."""
        text = self.forward.embed(self.text_encoder, ids, mask)
        place = Placement(self.next_chunk[context.shape[2] // CHUNK], first, context)

        def velocity(latents: Tensor, timestep: float) -> Tensor:
            sigmas = torch.full((len(latents), CHUNK), timestep / 1000, device=latents.device)
            return self.forward.velocity_at(self.student, latents, sigmas, text, place).float()

        *_, last = few_step(velocity, lambda step: noise[step], self.levels)
        return last.latents

    def loss(self, batch: Batch) -> Tensor:
        """Consistency loss: change of the clean prediction along the guided teacher's steps."""
        noisy = stepped = batch.noisy()
        at = batch
        with torch.no_grad():
            text = self.forward.embed(self.text_encoder, batch.ids, batch.mask)
            empty = self.forward.embed(self.text_encoder, *self._empty).expand_as(text)
            for _ in range(SOLVER_STEPS):
                nearer = replace(at, times=at.times - 1 / (SOLVER_STEPS * len(TIMESTEPS)))
                change = by_frame(to_sigmas(nearer.times) - to_sigmas(at.times))
                stepped = stepped + change * self.guided(at, stepped, text, empty)
                at = nearer
            target = self.clean(at, stepped, text)
        error = (self.clean(batch, noisy, text) - target)[:, :, batch.masked :]
        return ((error.square() + SOFT**2).sqrt() - SOFT).mean()

    def clean(self, batch: Batch, noisy: Tensor, text: Tensor) -> Tensor:
        """The student's clean prediction of noisy latents at the batch's sigmas."""
        velocity = self.forward.velocity(self.student, batch, noisy, text)
        return noisy - by_frame(to_sigmas(batch.times)) * velocity.float()

    def guided(self, batch: Batch, noisy: Tensor, text: Tensor, empty: Tensor) -> Tensor:
        """The teacher's guided velocity of noisy latents at the batch's sigmas, by one forward."""
        context = batch.context
        twice = replace(
            batch,
            times=torch.cat([batch.times] * 2),
            context=None if context is None else torch.cat([context] * 2),
        )
        both = torch.cat([text, empty])
        velocity = self.forward.velocity(self.teacher, twice, torch.cat([noisy] * 2), both)
        cond, uncond = velocity.float().chunk(2)
        return guide(cond, uncond, GUIDANCE)


def rollout_batch(rollouts: Rollouts, seed: int) -> Batch:
    """A causal batch of the student's rollouts."""
    clean = rollouts.latents
    generator = torch.Generator(clean.device).manual_seed(seed)
    return Batch(
        rollouts.ids, rollouts.mask, clean, draw_noise(clean.shape, generator),
        draw_times(len(clean), generator, causal=True),
        torch.full((), rollouts.first, device=clean.device), clean[:, :, :-CHUNK],
        masked=CHUNK if rollouts.first else 0,
    )  # fmt: skip


def snap_to_timesteps(batch: Batch) -> Batch:
    """Round the batch's times up to the student's timesteps."""
    return replace(batch, times=(batch.times * len(TIMESTEPS)).ceil() / len(TIMESTEPS))


def distill(
    work: Path,
    model: DemoModel,
    data: Dataset,
    *,
    steps: int,
    clips: int = BATCH,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Train or resume; returns the averaged LoRA. `work` holds checkpoint and curve."""
    data, teacher = replace(data, latents=data.latents.to(device)), model.to(device).eval()
    student = copy.deepcopy(teacher.transformer)
    lora = TrainableLora(student)
    forward = TrainingForward(tokens_per_frame=data.tokens_per_frame, device=device)
    half = HalfCopy(student, enabled=forward.lean)
    teacher = HalfCopy(teacher, enabled=forward.lean).model
    distillation = Distillation(half.model, teacher.transformer, teacher.text_encoder, forward)
    optimizer = Adam(lora.factors.values(), lr=RATE, betas=(0.9, 0.999))
    average = Average(lora.state_dict(), decay=EMA)
    batches_of = OwnRollouts(distillation, data, clips=clips)
    log, path, first = Log(work / "distill.jsonl"), work / "distill.pt", 0
    if state := load_checkpoint(path):
        lora.load_state_dict(state["lora"])
        optimizer.load_state_dict(state["optimizer"])
        average.load(state["average"])
        batches_of.load_state_dict(state["rollouts"])
        first = state["step"]
    half.refresh()

    def train_step(*tensors: Tensor, masked: int) -> Tensor:
        clear_gradients(lora.factors.values())
        loss = distillation.loss(Batch.of(tensors, masked))
        loss.backward()  # type: ignore[no-untyped-call]
        half.collect_gradients()
        lora.collect_gradients()
        optimizer.step()
        lora.merge()
        half.refresh()
        average.update(lora.state_dict())
        return loss.detach()

    captured = CapturedStep(train_step, device=device)
    for step, seed in batches(first, steps):
        batch, own = batches_of(seed)
        optimizer.set_rate(rate(step, steps, hold=0.4))
        average.set_step(step)
        loss = captured(*snap_to_timesteps(batch), masked=batch.masked)
        log.collect({"step": step, "clips": clips, "causal": batch.causal, "own": own}, loss)
        if is_checkpoint(step + 1, steps, every=50):
            log.flush()
            save_checkpoint(
                path, lora=lora.state_dict(), optimizer=optimizer.state_dict(),
                average=average.tensors, rollouts=batches_of.state_dict(), step=step + 1,
            )  # fmt: skip
    return average.tensors


class OwnRollouts:
    """Batches of the data set, of which a part are replaced by the student's own rollouts."""

    def __init__(self, distillation: Distillation, data: Dataset, *, clips: int) -> None:
        self.distillation, self.data = distillation, data
        tokenizer = distillation.forward.tokenizer
        self._draw = partial(
            draw_batch, data, causal_share=CAUSAL_SHARE, clips=clips, tokenizer=tokenizer
        )
        self._feed = Feed(distillation.forward.device)
        self._like = data.latents[:1].expand(clips, -1, -1, -1, -1)
        self.rollouts = self._start(0)

    def __call__(self, seed: int) -> tuple[Batch, bool]:
        """A batch, and whether it is of own rollouts, which are a chunk longer than the last."""
        batch = self._feed(partial(self._draw, seed))
        if not batch.causal or random.Random(seed + 1).random() >= ROLLOUT_SHARE:
            return batch, False
        if self.rollouts.end >= MAX_CHUNKS * CHUNK:
            self.rollouts = self._start(seed)
        self.rollouts = self.distillation.extend(self.rollouts, seed + 2)
        while self.rollouts.latents.shape[2] < FRAMES:
            self.rollouts = self.distillation.extend(self.rollouts, seed + 2 + self.rollouts.end)
        return rollout_batch(self.rollouts, seed), True

    def _start(self, seed: int) -> Rollouts:
        return start_rollouts(self.data.scenes, seed, self._like, self.distillation.forward)

    def state_dict(self) -> dict[str, Any]:
        """State to resume from."""
        return vars(self.rollouts)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state_dict`."""
        ids, mask, latents = (state[n].to(self._like.device) for n in ("ids", "mask", "latents"))
        self.rollouts = Rollouts(ids, mask, latents, first=state["first"])


def write_lora(lora: dict[str, Tensor], path: Path) -> None:
    """Write safetensors for `--lora`; half precision, under 1 MB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    halves = {f"transformer.{name}": t.half().contiguous().cpu() for name, t in lora.items()}
    save_file(halves, path)
