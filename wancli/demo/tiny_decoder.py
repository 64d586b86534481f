"""Train the demo's tiny decoder: TAEHV's shape, distilled from the decoder of its VAE.

The targets are the VAE's own frames, of clean latents and of noisy ones, so that it decodes what a
transformer makes, and previews, as the VAE does. Beside the distance of pixels, that of their
differences to their neighbours keeps edges sharp and plain backgrounds plain.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor

from wancli.catalog.tiny_decoder import DEMO_SHAPE
from wancli.demo.autoencoder import LATENT_NOISE, decode_whole, is_matrix
from wancli.demo.dataset import encode_clips
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
from wancli.models.tiny_decoder import TinyDecoder
from wancli.models.vae import denormalize, normalize

_SHARD = 25  # clips
_CROP, _FRAMES = 8, 9  # latents, each way, and latent frames of a crop
_LEVELS = 255
_HELD_OUT = 4  # clips, of which the curve has the PSNR


@dataclass(frozen=True)
class TinyBudget:
    """Sizes of the training."""

    clips: int  # of the data set
    batch: int  # clips of a step
    steps: int


def train_tiny_decoder(
    work: Path, vae: AutoencoderKLWan, *, budget: TinyBudget, device: str = "cpu"
) -> TinyDecoder:
    """Train or resume, for a VAE that has the statistics of its latents; `work` as in `train`."""
    latents, video = _targets(work, vae.to(device), clips=budget.clips, device=device)
    with torch.random.fork_rng():
        torch.random.manual_seed(3)
        model = TinyDecoder(DEMO_SHAPE).to(device)
    parameters = list(model.parameters())
    optimizer = Optimizer(
        [p for p in parameters if is_matrix(p)],
        [p for p in parameters if not is_matrix(p)],
        muon_lr=0.006,
        adam_lr=4e-3,
    )
    log, path, first = Log(work / "tiny-decoder.jsonl"), work / "tiny-decoder.pt", 0
    if state := load_checkpoint(path):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]

    def train_step(latents: Tensor, video: Tensor) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16):
            decoded = model(latents, model.empty_memory).float()
        loss = decoder_loss(decoded, _from_levels(video))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    def draw(seed: int) -> list[Tensor]:
        crops = _crops(latents, video, count=budget.batch, seed=seed)
        return [crop.to(device) for crop in crops]

    captured, feed = CapturedStep(train_step, device=device), Feed(device)
    for step, seed in batches(first, budget.steps):
        optimizer.set_rate(rate(step, budget.steps))
        loss = captured(*feed(partial(draw, seed)))
        if step % 20 == 0:
            log.write(step=step, clips=budget.batch, loss=loss.item())
        if is_checkpoint(step + 1, budget.steps, every=200):
            held_out = [each[-_HELD_OUT:].to(device) for each in (latents, video)]
            log.write(step=step, clips=budget.batch, psnr=_psnr(model, *held_out))
            state = optimizer.state_dict()
            save_checkpoint(path, model=model.state_dict(), optimizer=state, step=step + 1)
    return model.eval()


def _crops(latents: Tensor, video: Tensor, *, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Crops of `count` clips from their first frame on: latents, and their video."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(latents) - _HELD_OUT, generator=generator)[:count]
    most = [max(0, side - _CROP) + 1 for side in latents.shape[-2:]]
    top, left = (int(torch.randint(n, (), generator=generator)) for n in most)
    pixels, frames = DEMO_SHAPE.spatial, 1 + DEMO_SHAPE.temporal * (_FRAMES - 1)
    y, x, side = pixels * top, pixels * left, pixels * _CROP
    return (
        latents[chosen, :, :_FRAMES, top : top + _CROP, left : left + _CROP],
        video[chosen, :, :frames, y : y + side, x : x + side],
    )


def decoder_loss(decoded: Tensor, target: Tensor) -> Tensor:
    """L1 and L2 of the pixels, and L1 of what differs from pixel to pixel; [B, 3, T, H, W]."""
    error = decoded - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 5 * error.square().mean() + edges


def write_tiny_decoder(model: TinyDecoder, path: Path) -> None:
    """Write the weights in half precision, with the authors' keys."""
    path.parent.mkdir(exist_ok=True)
    tensors = {name: t.half().cpu().contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, path)


@torch.no_grad()
def _targets(
    work: Path, vae: AutoencoderKLWan, *, clips: int, device: str
) -> tuple[Tensor, Tensor]:
    """Normalised latents [N, C, F, H, W] and uint8 video [N, 3, T, H, W], on the CPU.

    Half of the latents are noisy. Existing shards in `work` are read.
    """
    paths = {first: work / f"tiny-targets-{first:05}.pt" for first in range(0, clips, _SHARD)}
    if not all(path.exists() for path in paths.values()):
        data = encode_clips(vae, work, clips=clips, device=device)
        mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (data.mean, data.std))
        clean = normalize(vae, data.latents[:clips] * std + mean).cpu()
    for first, path in paths.items():
        if not path.exists():
            latents = _add_noise(clean[first : first + _SHARD], seed=first)
            part_path = path.with_suffix(".part")
            video = torch.cat([_decode(vae, one[None]) for one in latents])
            torch.save({"latents": latents, "video": video}, part_path)
            part_path.replace(path)
    shards = [torch.load(path, weights_only=True) for path in paths.values()]
    latents, video = (torch.cat([shard[name] for shard in shards]) for name in ("latents", "video"))
    return latents, video


def _add_noise(latents: Tensor, *, seed: int) -> Tensor:
    """Add noise to half of the clips, each with a random scale."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(len(latents), 1, 1, 1, 1, generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    return latents + LATENT_NOISE * (2 * scale - 1).clamp_min(0) * noise


def _decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Uint8 video [1, 3, T, H, W] on the CPU."""
    video = decode_whole(vae, denormalize(vae, latents))
    return ((video + 1) / 2 * _LEVELS).round().to(torch.uint8).cpu()


def _from_levels(video: Tensor) -> Tensor:
    """Uint8 to [-1, 1]."""
    return video.float() / _LEVELS * 2 - 1


@torch.no_grad()
def _psnr(model: TinyDecoder, latents: Tensor, video: Tensor) -> float:
    """Mean PSNR in dB over clips."""
    decoded = model(latents, model.empty_memory).clamp(-1, 1)
    error = (decoded - _from_levels(video)).square().mean((1, 2, 3, 4))
    return float((10 * torch.log10(4 / error)).mean())
