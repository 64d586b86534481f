"""Latents to video frames and back; `StreamingDecoder` decodes a video that has no end yet.

Latents [B, C, F, H, W] are normalised, as the transformer sees them. A video is [B, 3, T, H, W] in
[-1, 1], its frames are uint8.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from diffusers.utils.torch_utils import get_module_execution_device
from numpy.typing import NDArray
from torch import Tensor

from wancli.errors import RunError
from wancli.models.vae_scaling import latent_normalizer, wide


def normalize(vae: Any, latents: Tensor) -> Tensor:
    """What the transformer sees, from what the VAE encodes; where it computes, in float32."""
    return latent_normalizer(vae).normalize(_wide(vae, latents))


def denormalize(vae: Any, latents: Tensor) -> Tensor:
    """What the VAE decodes, from what the transformer sees; where it computes, in its dtype."""
    return latent_normalizer(vae).denormalize(_wide(vae, latents)).to(vae.dtype)


def to_pixels(video: Tensor) -> Tensor:
    """[B, 3, T, H, W] in [-1, 1] to uint8 [B, T, H, W, 3] on the CPU."""
    exact = video.to(wide(video.dtype))
    levels = ((exact.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 4, 1).contiguous().cpu()


@contextmanager
def refusing_non_finite(vae: Any) -> Iterator[None]:
    """Check all that the VAE decodes in the block, as latents are checked. Raises RunError.

    Before it is clamped: then an infinite pixel would be white, and a NaN ends as black.
    """

    def check(_decoder: Any, _inputs: Any, video: Tensor) -> None:
        if not torch.isfinite(video).all():
            raise RunError(
                "the decoded video frames are not finite: the VAE went wrong.",
                hint="--vae-dtype float32",
            )

    hook = vae.decoder.register_forward_hook(check)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def encode(vae: Any, video: Tensor) -> Tensor:
    """Video [B, 3, T, H, W], whole, to latents [B, C, F, H, W]: the posterior's mode.

    Raises ValueError where the latents do not stand for exactly these frames.
    """
    frames, height, width = video.shape[2:]
    temporal, spatial = latent_normalizer(vae).temporal, latent_normalizer(vae).spatial
    if (frames - 1) % temporal or height % spatial or width % spatial:
        raise ValueError(
            f"{frames} video frames of {width}x{height} are not {temporal}k+1 of multiples of "
            f"{spatial} pixels"
        )
    given = video.to(get_module_execution_device(vae), vae.dtype)
    return normalize(vae, vae.encode(given).latent_dist.mode())


def encode_video(vae: AutoencoderKLWan, frames: NDArray[np.uint8]) -> Tensor:
    """Uint8 [T, H, W, 3] to latents [1, C, F, H, W]; ValueError where T is not 4k+1."""
    levels = torch.from_numpy(frames.copy()).permute(3, 0, 1, 2)
    return encode(vae, levels[None] / 127.5 - 1)


def encode_image(
    vae: AutoencoderKLWan, image: NDArray[np.uint8], *, latent_frames: int = 1
) -> Tensor:
    """Uint8 [H, W, 3] to latents [1, C, latent_frames, H, W] of a video that stands still."""
    frames = 1 + vae.config.scale_factor_temporal * (latent_frames - 1)
    return encode_video(vae, np.repeat(image[None], frames, axis=0))


class StreamingDecoder:
    """Decodes a video chunk by chunk, to the bit as `vae.decode` does all of it at once.

    What the causal convolutions remember lives here and not on the VAE, so that others may decode
    with it in between. A call that fails has not happened: it may be made again. Raises RunError
    for video that is not finite.
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        convolutions = sum(isinstance(m, WanCausalConv3d) for m in vae.decoder.modules())
        self._vae = vae
        self._memory: list[Any] = [None] * convolutions  # then Tensor, or "Rep" for a while

    def __call__(self, latents: Tensor) -> NDArray[np.uint8]:
        """The next latents [1, C, n, H, W] to uint8 [T, H, W, 3]; T is 4n, and 4n-3 at first."""
        video, memory = self._decode(latents)
        (frames,) = to_pixels(video)
        self._memory = memory
        out: NDArray[np.uint8] = frames.numpy()
        return out

    def video(self, latents: Tensor) -> Tensor:
        """The next latents [B, C, n, H, W] to their video [B, 3, T, H, W]."""
        video, self._memory = self._decode(latents)
        return video

    @property
    def bytes(self) -> int:
        """What it remembers; the same from the second latent on."""
        tensors = (entry for entry in self._memory if isinstance(entry, Tensor))
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def _decode(self, latents: Tensor) -> tuple[Tensor, list[Any]]:
        """The video, and what will have been remembered. Nothing that is remembered changes."""
        memory = self._memory.copy()
        with refusing_non_finite(self._vae):
            parts = [self._advance(memory, latent) for latent in torch.split(latents, 1, 2)]
        return torch.cat(parts, 2), memory

    @torch.no_grad()
    def _advance(self, memory: list[Any], latent: Tensor) -> Tensor:
        """Video of one latent frame. Replaces entries of `memory` and changes none in place."""
        prepared = self._vae.post_quant_conv(denormalize(self._vae, latent))
        out = self._vae.decoder(
            prepared, feat_cache=memory, feat_idx=[0], first_chunk=memory[0] is None
        )
        video: Tensor = unpatchify(out, self._vae.config.patch_size or 1)
        return video.clamp(-1, 1)


def _wide(vae: Any, latents: Tensor) -> Tensor:
    return latents.to(get_module_execution_device(vae), wide(vae.dtype))
