"""The streaming decoder is bit-identical to diffusers' own decode, for both Wan VAEs."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file
from torch import Tensor

from tests.fakes import tiny_vae
from wancli.errors import DecodeError
from wancli.generation.denoise import decode
from wancli.models.vae import (
    StreamingDecoder,
    denormalize,
    encode,
    encode_image,
    encode_video,
    normalize,
    to_pixels,
)

PARITY = Path(__file__).parents[1] / "parity"
FRAMES = 5  # latent frames
CHUNKS = {"uneven": (1, 2, 1, 1), "whole": (FRAMES,)}

# The same float32 arithmetic by the same library, but other machines choose other kernels.
# Measured: decode 1.9e-6, encode 6.3e-7.
TOLERANCE = 1e-5


def wan21_vae() -> AutoencoderKLWan:
    """The VAE whose inputs and outputs are in tests/parity."""
    vae = AutoencoderKLWan(**json.loads((PARITY / "vae_case.json").read_text())["config"])
    weights = load_file(PARITY / "vae_weights_diffusers_names.safetensors")
    vae.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return vae.eval()


def wan22_vae() -> AutoencoderKLWan:
    """A residual VAE with patches; narrow, with random weights and all stages of the real one."""
    return tiny_vae(
        dim_mult=[1, 1, 2, 2], is_residual=True, patch_size=2, in_channels=12, out_channels=12,
        scale_factor_spatial=16,
    )  # fmt: skip


@dataclass(frozen=True)
class Whole:
    """A VAE, latents of two videos, and the video that `vae.decode` returns for all at once."""

    vae: AutoencoderKLWan
    latents: Tensor
    video: Tensor


def whole(vae: AutoencoderKLWan, *, frames: int, seed: int = 0, batch: int = 2) -> Whole:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, vae.config.z_dim, frames, 4, 6, generator=generator)
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    with torch.no_grad():
        return Whole(vae, latents, vae.decode(latents * std + mean).sample)


@pytest.fixture(scope="module", params=["wan2.1", "wan2.2"])
def case(request: pytest.FixtureRequest) -> Whole:
    vae = wan22_vae() if request.param == "wan2.2" else wan21_vae()
    return whole(vae, frames=FRAMES)


def stream(decoder: StreamingDecoder, latents: Tensor, chunks: Sequence[int]) -> Iterator[Tensor]:
    """Yield the video of each chunk."""
    for chunk in latents.split(list(chunks), 2):
        yield decoder.video(chunk)


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_streaming_decode_equals_whole_decode(case: Whole, chunks: tuple[int, ...]):
    parts = list(stream(StreamingDecoder(case.vae), case.latents, chunks))
    assert [part.shape[2] for part in parts] == [4 * chunks[0] - 3, *(4 * n for n in chunks[1:])]
    assert torch.equal(torch.cat(parts, 2), case.video)


def test_streamed_frames_equal_those_of_generate(case: Whole):
    decoder, latents = StreamingDecoder(case.vae), case.latents[:1]
    frames = np.concatenate([decoder(chunk) for chunk in latents.split(3, 2)])
    assert frames.shape == (4 * FRAMES - 3, *case.video.shape[3:], 3)
    assert frames.dtype == np.uint8
    assert np.array_equal(frames, decode(case.vae, latents))


def test_a_plain_decode_in_between_does_not_interfere(case: Whole):
    decoder, parts = StreamingDecoder(case.vae), []
    other = whole(case.vae, frames=2, seed=1)
    for part in stream(decoder, case.latents, (3, 2)):
        parts.append(part)
        again = whole(case.vae, frames=2, seed=1)
        assert torch.equal(again.video, other.video)
    assert torch.equal(torch.cat(parts, 2), case.video)


def test_two_decoders_of_one_vae_are_independent(case: Whole):
    other = whole(case.vae, frames=FRAMES, seed=1)
    videos = zip(
        stream(StreamingDecoder(case.vae), case.latents, (3, 2)),
        stream(StreamingDecoder(case.vae), other.latents, (1, 4)),
        strict=True,
    )
    ours, theirs = (torch.cat(parts, 2) for parts in zip(*videos, strict=True))
    assert torch.equal(ours, case.video)
    assert torch.equal(theirs, other.video)


class Failing:
    """A hook that fails once, at its second latent frame."""

    def __init__(self) -> None:
        self.passed = 0

    def __call__(self, *_: object) -> None:
        self.passed += 1
        if self.passed == 2:
            raise MemoryError


@pytest.mark.parametrize(("layer", "done"), [("mid_block", 2), ("conv_out", 0)])
def test_a_failed_chunk_can_be_decoded_again(case: Whole, layer: str, done: int):
    decoder, latents = StreamingDecoder(case.vae), case.latents[:, :, : done + 3]
    parts = [decoder.video(latents[:, :, :done])] if done else []
    failing = Failing()
    hook = getattr(case.vae.decoder, layer).register_forward_hook(failing)
    try:
        with pytest.raises(MemoryError):
            decoder.video(latents[:, :, done:])
    finally:
        hook.remove()
    assert failing.passed == 2
    parts.append(decoder.video(latents[:, :, done:]))
    video = torch.cat(parts, 2)
    assert torch.equal(video, case.video[:, :, : 4 * latents.shape[2] - 3])


def test_a_batch_of_videos_is_rejected_without_side_effects(case: Whole):
    decoder = StreamingDecoder(case.vae)
    with pytest.raises(ValueError, match="too many values"):
        decoder(case.latents)
    assert decoder.nbytes == 0
    assert torch.equal(decoder.video(case.latents[:, :, :2]), case.video[:, :, :5])


def test_memory_does_not_grow_with_the_video(case: Whole):
    decoder, sizes = StreamingDecoder(case.vae), []
    for chunk in case.latents[:, :, 1:].split(2, 2):
        assert not decoder.video(chunk).requires_grad
        sizes.append(decoder.nbytes)
    assert len(sizes) == 2
    assert {*sizes} == {sizes[0]}
    assert sizes[0] > 0


def test_decoded_parity_latents_equal_the_stored_video():
    stored = load_file(PARITY / "vae_case.safetensors")
    latents = stored["latents_normalized"].float().transpose(0, 1)[None]
    decoder = StreamingDecoder(wan21_vae())
    video = torch.cat([decoder.video(chunk) for chunk in latents.split([3, 4], 2)], 2)
    expected = stored["video_decoded"].transpose(0, 1)[None]
    assert (video - expected).abs().max() < TOLERANCE


def test_encoded_parity_pixels_equal_the_stored_latents():
    stored = load_file(PARITY / "vae_case.safetensors")
    latents = encode(wan21_vae(), stored["encode_pixels"].float().transpose(0, 1)[None])
    expected = stored["encode_latents_normalized"].transpose(0, 1)[None]
    assert (latents - expected).abs().max() < TOLERANCE


@torch.no_grad()
def test_an_encoded_clip_is_the_normalised_mode_of_the_posterior(case: Whole):
    frames = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), np.uint8)
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None] / 127.5 - 1
    latents = encode_video(case.vae, frames)
    mode = case.vae.encode(video).latent_dist.mean
    assert latents.shape[:3] == (1, case.vae.config.z_dim, 3)
    assert torch.equal(latents, normalize(case.vae, mode))


def test_read_only_frames_can_be_encoded(case: Whole):
    frames = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    frozen = np.frombuffer(frames.tobytes(), np.uint8).reshape(frames.shape)
    assert torch.equal(encode_video(case.vae, frozen), encode_video(case.vae, frames))


def test_an_encoded_image_is_a_still_clip(case: Whole):
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    clip = np.stack([image] * 9)
    latents = encode_image(case.vae, image, latent_frames=3)
    assert torch.equal(latents, encode_video(case.vae, clip))
    assert encode_image(case.vae, image).shape[2] == 1


@pytest.mark.parametrize("shape", [(8, 16, 16, 3), (0, 16, 16, 3), (5, 16, 20, 3), (5, 12, 16, 3)])
def test_a_clip_of_an_invalid_size_or_length_is_rejected(shape: tuple[int, ...]):
    frames, height, width, _ = shape
    with pytest.raises(ValueError, match=f"{frames} video frames of {width}x{height}"):
        encode_video(tiny_vae(), np.zeros(shape, np.uint8))


def test_latents_are_normalised_by_the_config():
    vae = tiny_vae()
    ones = torch.ones(1, 4, 2, 3, 3)
    mean, std = (torch.tensor(vae.config[name]) for name in ("latents_mean", "latents_std"))
    assert torch.equal(denormalize(vae, 2 * ones)[0, :, 1, 2, 0], 2 * std + mean)
    assert torch.equal(normalize(vae, ones)[0, :, 1, 2, 0], (1 - mean) / std)
    half = tiny_vae().to(torch.bfloat16)
    assert denormalize(half, ones).dtype == torch.bfloat16
    assert torch.equal(normalize(half, ones), normalize(vae, ones))  # kept in float32


def test_every_pixel_level_survives_a_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    video = levels.view(1, 1, 1, 16, 16).expand(2, 3, 4, -1, -1) / 127.5 - 1
    assert torch.equal(to_pixels(video), levels.view(1, 1, 16, 16, 1).expand(2, 4, -1, -1, 3))


def test_values_out_of_range_are_clamped():
    video = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0]).view(1, 1, 5, 1, 1).expand(1, 3, 5, 1, 1)
    pixels = to_pixels(video)[0, :, 0, 0, 0]
    assert pixels.tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("decoding", ["whole", "streamed"])
def test_non_finite_video_is_rejected_before_clamping(value: float, decoding: str):
    vae = tiny_vae()
    torch.nn.init.constant_(vae.decoder.conv_out.bias, value)
    decode_latents = StreamingDecoder(vae) if decoding == "streamed" else partial(decode, vae)
    with pytest.raises(DecodeError, match="not finite") as caught:
        decode_latents(torch.zeros(1, 4, 1, 2, 2))
    assert caught.value.hint == "`vae_dtype float32`"
    assert not vae.decoder._forward_hooks
