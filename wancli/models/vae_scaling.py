"""What a VAE encodes and decodes, and what the transformer sees of that: each has its own scale."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLWan
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor


class LatentNormalizer(Protocol):
    """The way of one VAE, for latents [B, C, F, H, W] in `wide` numbers, where it computes."""

    @property
    def temporal(self) -> int:
        """Video frames per latent frame, after the first."""
        ...

    @property
    def spatial(self) -> int:
        """Pixels per latent, each way."""
        ...

    def normalize(self, latents: Tensor) -> Tensor:
        """What the transformer sees, from what the VAE encodes."""
        ...

    def denormalize(self, latents: Tensor) -> Tensor:
        """What the VAE decodes, from what the transformer sees."""
        ...


@dataclass(frozen=True)
class MeanStdNormalizer:
    """Wan's: a mean and a standard deviation, each [1, C, 1, 1, 1]."""

    temporal: int
    spatial: int
    mean: Tensor
    std: Tensor

    def normalize(self, latents: Tensor) -> Tensor:
        """What the transformer sees, from what the VAE encodes."""
        return (latents - self.mean) / self.std

    def denormalize(self, latents: Tensor) -> Tensor:
        """What the VAE decodes, from what the transformer sees."""
        return latents * self.std + self.mean


@dataclass(frozen=True)
class FactorNormalizer:
    """HunyuanVideo's: a factor."""

    temporal: int
    spatial: int
    factor: float

    def normalize(self, latents: Tensor) -> Tensor:
        """What the transformer sees, from what the VAE encodes."""
        return latents * self.factor

    def denormalize(self, latents: Tensor) -> Tensor:
        """What the VAE decodes, from what the transformer sees."""
        return latents / self.factor


def latent_normalizer(vae: Any) -> LatentNormalizer:
    """The scale of diffusers' VAE."""
    return _SCALES[type(vae)](vae)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Float32, or what is wider: 8 bits of a mantissa are too few to round to 256 levels."""
    return torch.promote_types(dtype, torch.float32)


def _wan(vae: AutoencoderKLWan) -> MeanStdNormalizer:
    config = vae.config
    place: Any = {"device": get_module_execution_device(vae), "dtype": wide(vae.dtype)}
    mean, std = (
        torch.tensor(values, **place).view(1, -1, 1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    return MeanStdNormalizer(config.scale_factor_temporal, config.scale_factor_spatial, mean, std)


def _hunyuan(vae: AutoencoderKLHunyuanVideo) -> FactorNormalizer:
    config = vae.config
    return FactorNormalizer(
        config.temporal_compression_ratio, config.spatial_compression_ratio, config.scaling_factor
    )


_SCALES: dict[type, Callable[[Any], LatentNormalizer]] = {
    AutoencoderKLWan: _wan,
    AutoencoderKLHunyuanVideo: _hunyuan,
}
