"""Project latents linearly to small RGB pictures: a preview while denoising, not a decoder."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from wancli.models.vae import encode, to_pixels
from wancli.models.vae_scaling import latent_normalizer

_GRID = 16  # latents per side: enough samples for the 48 channels of Wan 2.2's VAE
_COLORS = 8  # colours per side


@dataclass(frozen=True)
class LatentRgb:
    """The least-squares linear map from normalised latents to colours; `weight` [C + 1, 3]."""

    weight: Tensor

    def __call__(self, latents: Tensor) -> Tensor:
        """[1, C, F, H, W] to uint8 [F, H, W, 3] on the CPU, one pixel per latent."""
        wide = latents.to(self.weight.dtype)  # a pipeline may keep them in its transformer's dtype
        return to_pixels((_append_one(wide) @ self.weight).movedim(-1, 1))[0]


def fit_rgb(vae: Any) -> LatentRgb:
    """Fit the map to this VAE's latents of pictures of known colours, so that it suits any VAE.

    Published factors, which cover two VAEs (16 and 48 channels), are fitted in the same way.
    """
    generator = torch.Generator().manual_seed(0)
    colors = torch.rand(1, 3, _COLORS, _COLORS, generator=generator) * 2 - 1
    # Half of them black: videos are darker than uniform colours, and dark ones would look green.
    colors[:, :, torch.rand(_COLORS, _COLORS, generator=generator) < 0.5] = -1
    normalizer = latent_normalizer(vae)
    side = _GRID * normalizer.spatial
    picture = functional.interpolate(colors, size=(side, side), mode="bilinear")
    # Two latent frames: the VAE encodes the first differently from the others.
    still = picture[:, :, None].expand(-1, -1, 1 + normalizer.temporal, -1, -1)
    latents = encode(vae, still)
    frames, height, width = latents.shape[2:]
    targets = functional.adaptive_avg_pool3d(still, (frames, height, width))
    samples = _append_one(latents).flatten(0, -2).float().cpu()
    weight = torch.linalg.lstsq(samples, targets.movedim(1, -1).flatten(0, -2)).solution
    return LatentRgb(weight.to(latents.device))


def _append_one(latents: Tensor) -> Tensor:
    """[1, C, F, H, W] to [1, F, H, W, C + 1]: the column of ones is the bias."""
    last = latents.movedim(1, -1)
    return torch.cat([last, torch.ones_like(last[..., :1])], -1)
