"""Normalisation between a VAE's latents and those that the transformer sees."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLWan
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor


class LatentNormalizer(Protocol):
    """The normalisation of one VAE, for latents [B, C, F, H, W] in a `wide` dtype on its device."""

    @property
    def temporal(self) -> int:
        """Video frames per latent frame, after the first."""
        ...

    @property
    def spatial(self) -> int:
        """Pixels per latent, in height and width."""
        ...

    def normalize(self, latents: Tensor) -> Tensor:
        """Latents of the VAE to normalised ones."""
        ...

    def denormalize(self, latents: Tensor) -> Tensor:
        """Normalised latents to those of the VAE."""
        ...


@dataclass(frozen=True)
class MeanStdNormalizer:
    """Wan: a mean and a standard deviation per channel, each [1, C, 1, 1, 1]."""

    temporal: int
    spatial: int
    mean: Tensor
    std: Tensor

    def normalize(self, latents: Tensor) -> Tensor:
        """Latents of the VAE to normalised ones."""
        return (latents - self.mean) / self.std

    def denormalize(self, latents: Tensor) -> Tensor:
        """Normalised latents to those of the VAE."""
        return latents * self.std + self.mean


@dataclass(frozen=True)
class FactorNormalizer:
    """HunyuanVideo: one scaling factor."""

    temporal: int
    spatial: int
    factor: float

    def normalize(self, latents: Tensor) -> Tensor:
        """Latents of the VAE to normalised ones."""
        return latents * self.factor

    def denormalize(self, latents: Tensor) -> Tensor:
        """Normalised latents to those of the VAE."""
        return latents / self.factor


def latent_normalizer(vae: Any) -> LatentNormalizer:
    """The normaliser of one of diffusers' VAEs."""
    return _NORMALIZERS[type(vae)](vae)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Float32 or wider: bfloat16's mantissa is too short for 256 levels."""
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


_NORMALIZERS: dict[type, Callable[[Any], LatentNormalizer]] = {
    AutoencoderKLWan: _wan,
    AutoencoderKLHunyuanVideo: _hunyuan,
}
