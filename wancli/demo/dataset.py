"""Latents of rendered clips, encoded once, in shards to resume from."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from wancli.demo.autoencoder import encode_whole
from wancli.demo.training import CapturedStep, Feed, Log
from wancli.demo.world import MOTIONS, Combination, Scene, combinations, render, sample_scene

CLIP = 45  # video frames: 12 latent frames, of which training uses 9 consecutive ones
SHARD = 250  # clips
BATCH = 10  # clips encoded at once
# Drawn twice as often, because they are hardest: corners, and those that turn.
HARD_SHAPE, HARD_MOTION = "square", "spinning"


@dataclass(frozen=True)
class Dataset:
    """Normalised latents [N, C, F, H, W], and the scene of each clip."""

    latents: Tensor
    scenes: list[Combination]
    mean: list[float]  # of the raw latents, by channel
    std: list[float]

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of a latent frame: patches of 2x2."""
        rows, columns = self.latents.shape[-2:]
        return rows * columns // 4


@torch.no_grad()
def encode_clips(vae: AutoencoderKLWan, work: Path, *, clips: int, device: str = "cpu") -> Dataset:
    """Render and encode `clips` clips; existing shards in `work` are read instead."""
    choices, log = combinations(held_out=False), Log(work / "latents.jsonl")
    choices += [combination for combination in choices if combination.shape == HARD_SHAPE]
    motions = [*MOTIONS, HARD_MOTION]

    def encode(video: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            latents: Tensor = encode_whole(vae, video).mode()
        return latents.float()

    captured, feed = CapturedStep(encode, device=device), Feed(device)
    shards, scenes = [], []
    for shard in range(-(-clips // SHARD)):
        rng = random.Random(f"clips {shard}")
        drawn = [sample_scene(rng, choices, motions) for _ in range(SHARD)]
        path = work / f"latents-{shard:03}.pt"
        if not path.exists():
            parts = [drawn[i : i + BATCH] for i in range(0, SHARD, BATCH)]
            encoded = [captured(*feed(partial(_render, part, device))) for part in parts]
            part_path = path.with_suffix(".part")
            torch.save(torch.cat(encoded).cpu(), part_path)
            part_path.replace(path)
            log.write(clips=(shard + 1) * SHARD)
        shards.append(torch.load(path, weights_only=True))
        scenes += [scene.combination for scene in drawn]
    latents = torch.cat(shards)
    std, mean = torch.std_mean(latents[:1000], (0, 2, 3, 4), keepdim=True)  # of any number of clips
    normal = (latents - mean) / std
    return Dataset(normal, scenes, mean.flatten().tolist(), std.flatten().tolist())


def _render(scenes: Sequence[Scene], device: str) -> list[Tensor]:
    """Video [B, 3, CLIP, H, W] of the scenes."""
    with torch.device(device):
        return [render(scenes, frames=CLIP)]
