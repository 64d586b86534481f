"""Train the demo's AutoencoderKLWan: the Wan 2.2 shape, 8x8 pixels and 4 video frames per latent.

It trains on crops of 13 video frames (4 latent frames): the causal convolutions have three states
(first, second, later), and fewer frames leave the later ones untrained. An encoder trained on no
more can drift on long clips (gray turned navy after 17 frames, 34 dB fell to 11); the decoder does
not. So every fourth step has longer clips, and a short second stage trains the encoder alone on
clips as long as those of the data set.

Half of the clips are decoded from noisy latents, so that small errors of the transformer still give
a clean outline (RAE, arXiv:2510.11690; l-DeTok, arXiv:2507.15856).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from wancli.demo.training import Log, Optimizer, batches, load_checkpoint, rate, save_checkpoint
from wancli.demo.world import SIDE, combinations, render, sample_scene

CHANNELS = 8
CROP = 64  # pixels
KL_WEIGHT = 1e-4
LATENT_NOISE = 0.3  # maximum, in standard deviations of the latents


@dataclass(frozen=True)
class Stage:
    """A stage of the training, with its own curve and checkpoint in the work folder."""

    name: str
    steps: int
    clips: Sequence[int]  # video frames of a clip, cycled over the steps
    frames: int  # maximum video frames of a batch
    muon_lr: float
    adam_lr: float
    encoder_only: bool = False

    def shape(self, step: int) -> tuple[int, int]:
        """Number of clips of a step, and video frames of each."""
        clip = self.clips[step % len(self.clips)]
        return self.frames // clip, clip


STAGES = (
    Stage("vae", 1200, clips=(13, 13, 13, 33), frames=78, muon_lr=0.02, adam_lr=2e-3),
    Stage("vae-long", 80, (45,), frames=90, muon_lr=0.003, adam_lr=3e-4, encoder_only=True),
)


def make_autoencoder(**statistics: Any) -> AutoencoderKLWan:
    """Untrained autoencoder; `statistics` are latents_mean and latents_std, once measured."""
    return AutoencoderKLWan(
        base_dim=32,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True, True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        is_residual=True,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
        **(statistics or {"latents_mean": [0.0] * CHANNELS, "latents_std": [1.0] * CHANNELS}),
    )


def crops(seed: int, count: int, *, frames: int) -> Tensor:
    """Crops of training scenes, [count, 3, frames, CROP, CROP] in [-1, 1]."""
    rng = random.Random(seed)
    choices = combinations(held_out=False)
    video = render([sample_scene(rng, choices) for _ in range(count)], frames=frames)
    out = []
    for clip in video:
        top, left = rng.randint(0, SIDE - CROP), rng.randint(0, SIDE - CROP)
        out.append(clip[:, :, top : top + CROP, left : left + CROP])
    return torch.stack(out)


def is_matrix(p: Tensor) -> bool:
    """Whether Muon optimizes it: flattened to two dimensions, neither is thin."""
    return p.ndim >= 2 and p.shape[0] > 1 and p[0].numel() > 8


def train_autoencoder(
    work: Path, *, device: str = "cpu", stages: Sequence[Stage] = STAGES
) -> AutoencoderKLWan:
    """Train or resume; `work` holds checkpoints and curves. Returns the autoencoder."""
    with torch.random.fork_rng():
        torch.random.manual_seed(0)  # diffusers takes no generator
        vae = make_autoencoder().to(device)
    for stage in stages:
        _train(vae, stage, work, device)
    return vae.eval()


def _train(vae: AutoencoderKLWan, stage: Stage, work: Path, device: str) -> None:
    parts = (vae.encoder, vae.quant_conv) if stage.encoder_only else (vae,)
    parameters = [p for part in parts for p in part.parameters()]
    optimizer = Optimizer(
        [p for p in parameters if is_matrix(p)],
        [p for p in parameters if not is_matrix(p)],
        muon_lr=stage.muon_lr,
        adam_lr=stage.adam_lr,
    )
    log, path, first = Log(work / f"{stage.name}.jsonl"), work / f"{stage.name}.pt", 0
    if state := load_checkpoint(path):
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    for step, seed in batches(first, stage.steps):
        clips, frames = stage.shape(step)
        video = crops(seed, clips, frames=frames).to(device)
        losses = autoencoder_losses(vae, video, seed)
        loss = torch.stack(list(losses.values())).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(rate(step, stage.steps))
        if step % 20 == 0:
            log.write(step=step, **{k: v.item() for k, v in losses.items()})
        if (step + 1) % 50 == 0 or step + 1 == stage.steps:
            some = crops(7, 6, frames=max(stage.clips)).to(device)
            log.write(step=step + 1, psnr=autoencoder_psnr(vae, some))
            state = optimizer.state_dict()
            save_checkpoint(path, model=vae.state_dict(), optimizer=state, step=step + 1)
    vae.zero_grad()


def autoencoder_losses(vae: AutoencoderKLWan, video: Tensor, seed: int) -> dict[str, Tensor]:
    """Weighted L1, L2 and KL losses of video [B, 3, F, H, W]."""
    generator = torch.Generator(video.device).manual_seed(seed)
    with torch.autocast(video.device.type, dtype=torch.bfloat16):
        posterior = vae.encode(video).latent_dist
        latents = add_latent_noise(posterior.sample(generator), generator)
        decoded = vae.decode(latents).sample.float()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return {
        "l1": nn.functional.l1_loss(decoded, video),
        "l2": 5 * nn.functional.mse_loss(decoded, video),
        "kl": KL_WEIGHT * kl,
    }


def add_latent_noise(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Add noise to half of the clips of [B, C, F, H, W], each with a random scale."""
    std = latents.detach().float().std((0, 2, 3, 4), keepdim=True)
    device = latents.device
    draws = torch.rand(len(latents), 1, 1, 1, 1, generator=generator, device=device)
    noise = torch.randn(latents.shape, generator=generator, device=device)
    return latents + LATENT_NOISE * (2 * draws - 1).clamp_min(0) * std * noise


@torch.inference_mode()
def autoencoder_psnr(vae: AutoencoderKLWan, video: Tensor) -> float:
    """Mean reconstruction PSNR in dB over clips of video [B, 3, F, H, W] in [-1, 1]."""
    with torch.autocast(video.device.type, dtype=torch.bfloat16):
        decoded = vae.decode(vae.encode(video).latent_dist.mode()).sample.float().clamp(-1, 1)
    error = (decoded - video).square().mean((1, 2, 3, 4))
    return float((10 * torch.log10(4 / error)).mean())
