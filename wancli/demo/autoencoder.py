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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from wancli.demo.lean import make_lean_autoencoder
from wancli.demo.training import (
    CapturedStep,
    Feed,
    Log,
    Optimizer,
    batches,
    is_checkpoint,
    load_checkpoint,
    rate,
    save_checkpoint,
)
from wancli.demo.world import SIDE, combinations, render, sample_scene

CHANNELS = 8
CROP = 64  # pixels
KL_WEIGHT = 1e-4
LATENT_NOISE = 0.3  # maximum, in standard deviations of the latents
LOSSES = ("l1", "l2", "kl")


@dataclass(frozen=True)
class Stage:
    """A stage of the training, with its own curve and checkpoint in the work folder."""

    name: str
    steps: int
    clips: Sequence[int]  # video frames of a clip, cycled over the steps
    frames: int  # maximum video frames of a batch
    muon_lr: float
    adam_lr: float
    parts: tuple[str, ...] = ("encoder", "quant_conv", "post_quant_conv", "decoder")  # trained

    def shape(self, step: int) -> tuple[int, int]:
        """Number of clips of a step, and video frames of each."""
        clip = self.clips[step % len(self.clips)]
        return self.frames // clip, clip


STAGES = (
    Stage("vae", 1200, clips=(13, 13, 13, 33), frames=78, muon_lr=0.02, adam_lr=2e-3),
    Stage(
        "vae-long",
        80,
        (45,),
        frames=90,
        muon_lr=0.003,
        adam_lr=3e-4,
        parts=("encoder", "quant_conv"),
    ),
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


def encode_whole(vae: AutoencoderKLWan, video: Tensor) -> DiagonalGaussianDistribution:
    """Encode video [B, 3, F, H, W] in two parts: the first frame, and all others.

    The same as `vae.encode`, whose parts have four frames each, with fewer and larger kernels.
    """
    x = patchify(video, patch_size=vae.config.patch_size)
    vae.clear_cache()
    parts = [
        vae.encoder(part, feat_cache=vae._enc_feat_map, feat_idx=[0])
        for part in (x[:, :, :1], x[:, :, 1:])
        if part.shape[2]
    ]
    vae.clear_cache()
    return DiagonalGaussianDistribution(vae.quant_conv(torch.cat(parts, 2)))


def decode_whole(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Decode latents [B, C, F, H, W] in two parts: the same as `vae.decode`."""
    x = vae.post_quant_conv(latents)
    vae.clear_cache()
    parts = [
        vae.decoder(part, feat_cache=vae._feat_map, feat_idx=[0], first_chunk=first)
        for part, first in ((x[:, :, :1], True), (x[:, :, 1:], False))
        if part.shape[2]
    ]
    vae.clear_cache()
    video: Tensor = unpatchify(torch.cat(parts, 2), patch_size=vae.config.patch_size)
    return video.clamp(-1.0, 1.0)


def crops(seed: int, count: int, *, frames: int, device: str) -> Tensor:
    """Crops of training scenes, [count, 3, frames, CROP, CROP] in [-1, 1]."""
    rng = random.Random(seed)
    choices = combinations(held_out=False)
    scenes = [sample_scene(rng, choices) for _ in range(count)]
    with torch.device(device):
        video = render(scenes, frames=frames)
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
    vae.requires_grad_(requires_grad=False)
    for part in stage.parts:
        vae.get_submodule(part).requires_grad_()
    parameters = [p for p in vae.parameters() if p.requires_grad]
    optimizer = Optimizer(
        [p for p in parameters if is_matrix(p)],
        [p for p in parameters if not is_matrix(p)],
        muon_lr=stage.muon_lr,
        adam_lr=stage.adam_lr,
    )
    half = make_lean_autoencoder(vae, enabled=device != "cpu")
    log, path, first = Log(work / f"{stage.name}.jsonl"), work / f"{stage.name}.pt", 0
    if state := load_checkpoint(path):
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]

    def train_step(video: Tensor, *draws: Tensor) -> Tensor:
        optimizer.zero_grad()
        half.refresh()
        losses = autoencoder_losses(half.model, video, LatentDraws(*draws))
        losses.sum().backward()  # type: ignore[no-untyped-call]
        half.collect_gradients()
        optimizer.step()
        return losses.detach()

    def draw(step: int, seed: int) -> list[Tensor]:
        clips, frames = stage.shape(step)
        video = crops(seed, clips, frames=frames, device=device)
        return [video, *draw_latents(video, seed)]

    captured, feed = CapturedStep(train_step, device=device), Feed(device)
    for step, seed in batches(first, stage.steps):
        inputs = feed(partial(draw, step, seed))
        optimizer.set_rate(rate(step, stage.steps))
        losses = captured(*inputs)
        if step % 20 == 0:
            log.write(step=step, **dict(zip(LOSSES, losses.tolist(), strict=True)))
        if is_checkpoint(step + 1, stage.steps, every=100):
            some = crops(7, 6, frames=max(stage.clips), device=device)
            log.write(step=step + 1, frames=stage.frames, psnr=autoencoder_psnr(vae, some))
            state = optimizer.state_dict()
            save_checkpoint(path, model=vae.state_dict(), optimizer=state, step=step + 1)
    vae.zero_grad()


class LatentDraws(NamedTuple):
    """Random numbers of a step, for latents [B, C, F, H, W]."""

    sample: Tensor  # standard normal, of the posterior
    scale: Tensor  # [B, 1, 1, 1, 1] in [0, 1): LATENT_NOISE is added to those over a half
    noise: Tensor  # standard normal


def draw_latents(video: Tensor, seed: int) -> LatentDraws:
    """Draw the random numbers of a step on video [B, 3, F, H, W]."""
    clips, _, frames, height, width = video.shape
    generator = torch.Generator(video.device).manual_seed(seed)
    shape = (clips, CHANNELS, (frames - 1) // 4 + 1, height // 8, width // 8)
    draw: dict[str, Any] = {"generator": generator, "device": video.device}
    sample = torch.randn(shape, **draw)
    return LatentDraws(sample, torch.rand(clips, 1, 1, 1, 1, **draw), torch.randn(shape, **draw))


def autoencoder_losses(vae: AutoencoderKLWan, video: Tensor, draws: LatentDraws) -> Tensor:
    """Weighted L1, L2 and KL losses [3] of video [B, 3, F, H, W]."""
    dtype = next(vae.parameters()).dtype
    whole = dtype == torch.float32
    with torch.autocast(video.device.type, dtype=torch.bfloat16, enabled=whole):
        posterior = encode_whole(vae, video.to(dtype))
        latents = add_latent_noise(posterior.mean + posterior.std * draws.sample, draws)
        decoded = decode_whole(vae, latents.to(dtype)).float()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return torch.stack(
        [
            nn.functional.l1_loss(decoded, video),
            5 * nn.functional.mse_loss(decoded, video),
            KL_WEIGHT * kl,
        ]
    )


def add_latent_noise(latents: Tensor, draws: LatentDraws) -> Tensor:
    """Add noise to half of the clips of [B, C, F, H, W], each with a random scale."""
    std = latents.detach().float().std((0, 2, 3, 4), keepdim=True)
    return latents + LATENT_NOISE * (2 * draws.scale - 1).clamp_min(0) * std * draws.noise


@torch.inference_mode()
def autoencoder_psnr(vae: AutoencoderKLWan, video: Tensor) -> float:
    """Mean reconstruction PSNR in dB over clips of video [B, 3, F, H, W] in [-1, 1]."""
    with torch.autocast(video.device.type, dtype=torch.bfloat16):
        decoded = decode_whole(vae, encode_whole(vae, video).mode()).float()
    error = (decoded - video).square().mean((1, 2, 3, 4))
    return float((10 * torch.log10(4 / error)).mean())
