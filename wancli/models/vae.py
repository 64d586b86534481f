"""Encode video to latents and decode it, whole or chunk by chunk (`StreamingDecoder`).

Latents [B, C, F, H, W] are normalised, as the transformer sees them. Video is [B, 3, T, H, W] in
[-1, 1], frames are uint8.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from diffusers.utils.torch_utils import get_module_execution_device
from numpy.typing import NDArray
from torch import Tensor, nn

from wancli.errors import DecodeError
from wancli.models.fast_decoder import latents_per_call
from wancli.models.tiny_decoder import TinyDecoder
from wancli.models.vae_scaling import latent_normalizer, wide


def normalize(vae: Any, latents: Tensor) -> Tensor:
    """Latents of the VAE to normalised ones, in float32 (or wider) on the VAE's device."""
    return latent_normalizer(vae).normalize(_wide(vae, latents))


def denormalize(vae: Any, latents: Tensor) -> Tensor:
    """Normalised latents to those of the VAE, in its dtype on its device."""
    return latent_normalizer(vae).denormalize(_wide(vae, latents)).to(vae.dtype)


def to_levels(video: Tensor) -> Tensor:
    """[B, 3, T, H, W] in [-1, 1] to uint8 [B, T, H, W, 3] on the same device."""
    exact = video.to(wide(video.dtype))
    levels = ((exact.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 4, 1).contiguous()


def to_pixels(video: Tensor) -> Tensor:
    """[B, 3, T, H, W] in [-1, 1] to uint8 [B, T, H, W, 3] on the CPU."""
    return to_levels(video).cpu()


@contextmanager
def require_finite(vae: Any, on_frames: Callable[[int], None] | None = None) -> Iterator[None]:
    """Raise DecodeError if anything the VAE decodes in the block is not finite.

    Checked before clamping, which would turn inf into white and NaN into black. `on_frames` is
    called with the number of frames of each call of the decoder.
    """

    def check(_decoder: Any, _inputs: Any, video: Tensor) -> None:
        check_finite(torch.isfinite(video).all())
        if on_frames:
            on_frames(video.shape[2])

    hook = vae.decoder.register_forward_hook(check)
    try:
        yield
    finally:
        hook.remove()


def check_finite(finite: Tensor) -> None:
    """Raise DecodeError if the flag of decoded frames is false. Waits for its device."""
    if not finite:
        raise DecodeError("the decoded video frames are not finite.", hint="`vae_dtype float32`")


@torch.no_grad()
def encode(vae: Any, video: Tensor) -> Tensor:
    """Encode a whole video [B, 3, T, H, W] to latents [B, C, F, H, W]: the posterior's mode.

    Raises ValueError for a size or length that the VAE cannot represent exactly.
    """
    frames, height, width = video.shape[2:]
    temporal, spatial = latent_normalizer(vae).temporal, latent_normalizer(vae).spatial
    if (frames - 1) % temporal or height % spatial or width % spatial:
        raise ValueError(
            f"{frames} video frames of {width}x{height} are not {temporal}k+1 of multiples of "
            f"{spatial} pixels"
        )
    video = video.to(get_module_execution_device(vae), vae.dtype)
    return normalize(vae, vae.encode(video).latent_dist.mode())


def encode_video(vae: AutoencoderKLWan, frames: NDArray[np.uint8]) -> Tensor:
    """Uint8 [T, H, W, 3] to latents [1, C, F, H, W]; ValueError where T is not 4k+1."""
    levels = torch.from_numpy(frames.copy()).permute(3, 0, 1, 2)
    return encode(vae, levels[None] / 127.5 - 1)


def encode_image(
    vae: AutoencoderKLWan, image: NDArray[np.uint8], *, latent_frames: int = 1
) -> Tensor:
    """Uint8 [H, W, 3] to latents [1, C, latent_frames, H, W] of a still video."""
    frames = 1 + vae.config.scale_factor_temporal * (latent_frames - 1)
    return encode_video(vae, np.repeat(image[None], frames, axis=0))


@dataclass(frozen=True)
class DecodedFrames:
    """Video frames on the device that decodes them, which may still be at it."""

    pixels: Tensor  # uint8 [T, H, W, 3]
    finite: Tensor  # bool, a scalar: whether they were finite before they became levels


class StreamingDecoder:
    """Decodes a video chunk by chunk, bit-identical to `vae.decode` of the whole.

    A FastDecoder takes several latent frames per call, and is then the same but for rounding.
    The cache of the causal convolutions, or the memory of a TinyDecoder, lives here, not on the
    VAE, so that the VAE can decode other videos in between. A call that fails leaves it unchanged
    and can be repeated.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self._vae, self._normalizer = vae, latent_normalizer(vae)
        # Later Tensor or, of a causal convolution at first, "Rep".
        self._cache: list[Any] = [None] * _caching_layers(vae.decoder)

    def frames(self, latents: Tensor) -> DecodedFrames:
        """Decode the next latents [1, C, n, H, W] to T = 4n frames (first: 4n - 3).

        Does not wait for the device: whoever reads the frames has to check that they are finite.
        """
        video, finite, cache = self._decode(latents)
        (pixels,) = to_levels(video)
        self._cache = cache
        return DecodedFrames(pixels, finite)

    def __call__(self, latents: Tensor) -> NDArray[np.uint8]:
        """The same frames, uint8 [T, H, W, 3], once they are decoded. Raises DecodeError."""
        before = self._cache
        decoded = self.frames(latents)
        try:
            check_finite(decoded.finite)
        except DecodeError:
            self._cache = before
            raise
        out: NDArray[np.uint8] = decoded.pixels.numpy(force=True)
        return out

    def video(self, latents: Tensor) -> Tensor:
        """Decode the next latents [B, C, n, H, W] to video [B, 3, T, H, W]. Raises DecodeError."""
        video, finite, cache = self._decode(latents)
        check_finite(finite)
        self._cache = cache
        return video

    @property
    def nbytes(self) -> int:
        """Size of the cache; constant from the second latent on."""
        tensors = (entry for entry in self._cache if isinstance(entry, Tensor))
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def _decode(self, latents: Tensor) -> tuple[Tensor, Tensor, list[Any]]:
        """The video, whether it is finite, and the cache after it, which is not kept yet."""
        cache, wide = self._cache.copy(), _wide(self._vae, latents)
        parts = [self._advance(cache, part) for part in self._split(wide)]
        video = torch.cat(parts, 2)
        # Before clamping, which would turn inf into white and NaN into black.
        return video.clamp(-1, 1), torch.isfinite(video).all(), cache

    def _split(self, latents: Tensor) -> tuple[Tensor, ...]:
        """Latents of each call; the first latent frame of a video, which is not doubled, alone."""
        first = latents[:, :, :1] if self._cache[0] is None else latents[:, :, :0]
        rest = latents[:, :, first.shape[2] :]
        parts = (first, *torch.split(rest, latents_per_call(self._vae), 2))
        return tuple(part for part in parts if part.shape[2])

    @torch.no_grad()
    def _advance(self, cache: list[Any], latents: Tensor) -> Tensor:
        """Video of one call, not clamped. Replaces entries of `cache`, never in place."""
        if isinstance(self._vae.decoder, TinyDecoder):
            tiny: Tensor = self._vae.decoder(latents, cache)
            return tiny
        denormalized = self._normalizer.denormalize(latents).to(self._vae.dtype)
        out = self._vae.decoder(
            self._vae.post_quant_conv(denormalized),
            feat_cache=cache,
            feat_idx=[0],
            first_chunk=cache[0] is None,
        )
        video: Tensor = unpatchify(out, self._vae.config.patch_size or 1)
        return video


def _caching_layers(decoder: nn.Module) -> int:
    """Number of layers that keep frames for the next call."""
    if isinstance(decoder, TinyDecoder):
        return len(decoder.empty_memory)
    return sum(isinstance(layer, WanCausalConv3d) for layer in decoder.modules())


def decodes_in_parts(vae: Any) -> bool:
    """Whether a whole video, too, is decoded by a StreamingDecoder, and not by diffusers."""
    return isinstance(vae.decoder, TinyDecoder) or (
        latents_per_call(vae) > 1 and not vae.use_tiling
    )


def _wide(vae: Any, latents: Tensor) -> Tensor:
    return latents.to(get_module_execution_device(vae), wide(vae.dtype))
