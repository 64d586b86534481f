"""Latents as small pictures, by a linear map: a glance while denoising, not a decoder."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from wancli.models.vae import encode, to_pixels
from wancli.models.vae_scaling import latent_normalizer

_GRID = 16  # latents along a side: samples enough for the 48 channels of Wan 2.2's VAE
_COLORS = 8  # colours along a side


@dataclass(frozen=True)
class LatentRgb:
    """The nearest linear map from normalised latents to colours; `weight` [C + 1, 3]."""

    weight: Tensor

    def __call__(self, latents: Tensor) -> Tensor:
        """[1, C, F, H, W] to uint8 [F, H, W, 3] on the CPU: a pixel is a latent."""
        wide = latents.to(self.weight.dtype)  # a pipeline may keep them as its transformer has them
        return to_pixels((_with_one(wide) @ self.weight).movedim(-1, 1))[0]


def fit_rgb(vae: Any) -> LatentRgb:
    """Fit it to what this VAE makes of pictures whose colours are known, so that any VAE will do.

    The factors that others publish are for two VAEs (16 and 48 channels), and found in this way.
    """
    generator = torch.Generator().manual_seed(0)
    colors = torch.rand(1, 3, _COLORS, _COLORS, generator=generator) * 2 - 1
    # Half of them black: videos are darker than chance, and a dark one should not look green.
    colors[:, :, torch.rand(_COLORS, _COLORS, generator=generator) < 0.5] = -1
    scale = latent_normalizer(vae)
    side = _GRID * scale.spatial
    picture = functional.interpolate(colors, size=(side, side), mode="bilinear")
    # Two latent frames: of the first, and of one after it, which the VAE encodes otherwise.
    still = picture[:, :, None].expand(-1, -1, 1 + scale.temporal, -1, -1)
    latents = encode(vae, still)
    frames, height, width = latents.shape[2:]
    shown = functional.adaptive_avg_pool3d(still, (frames, height, width))
    samples = _with_one(latents).flatten(0, -2).float().cpu()
    weight = torch.linalg.lstsq(samples, shown.movedim(1, -1).flatten(0, -2)).solution
    return LatentRgb(weight.to(latents.device))


def _with_one(latents: Tensor) -> Tensor:
    """[1, C, F, H, W] to [1, F, H, W, C + 1], so that the map can shift colours."""
    last = latents.movedim(1, -1)
    return torch.cat([last, torch.ones_like(last[..., :1])], -1)
