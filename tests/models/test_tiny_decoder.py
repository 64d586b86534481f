"""The tiny decoder gives the frames of its authors' code, and the same ones chunk by chunk."""

from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.fakes import tiny_vae
from wancli.catalog.decoder_files import add_vae_decoder
from wancli.catalog.specs import ModelSpec
from wancli.catalog.tiny_decoder import TinyDecoderShape, tiny_decoder_shape
from wancli.generation.denoise import decode
from wancli.models.tiny_decoder import TinyDecoder, load_tiny_decoder
from wancli.models.vae import StreamingDecoder, to_pixels

PARITY = Path(__file__).parents[1] / "parity" / "tiny_decoder.safetensors"
CASES = {  # of few channels, in the order of layers of the real ones
    "taew2_1": TinyDecoderShape(6, widths=(8, 6, 5, 4)),
    "taew2_2": TinyDecoderShape(8, widths=(8, 6, 5, 4), patch=2),
}
TOLERANCE = 1e-5  # measured: 4e-7


def tensors_of(case: str) -> dict[str, Tensor]:
    prefix = f"{case}."
    stored = load_file(PARITY).items()
    return {n.removeprefix(prefix): t.float() for n, t in stored if n.startswith(prefix)}


def decoder_of(case: str) -> tuple[TinyDecoder, Tensor, Tensor]:
    """The decoder, latents [1, C, F, H, W], and their video [1, 3, T, H, W] in [0, 1]."""
    tensors = tensors_of(case)
    latents, video = (tensors.pop(name).movedim(1, 2) for name in ("latents", "video"))
    model = TinyDecoder(CASES[case])
    model.load_state_dict(tensors)
    return model.eval(), latents, video


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_frames_are_those_of_the_authors_code(case: str):
    model, latents, video = decoder_of(case)
    decoded = (model(latents, model.empty_memory) + 1) / 2
    torch.testing.assert_close(decoded.clamp(0, 1), video, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_sizes_are_read_from_the_shapes_of_a_checkpoint(case: str):
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors_of(case).items()}
    assert tiny_decoder_shape(shapes) == CASES[case]
    assert tiny_decoder_shape({"decoder.1.weight": (6, 8, 3, 3)}) is None


@pytest.mark.parametrize("patch", [1, 2])
def test_the_real_ones_have_the_parameters_of_the_authors_class(patch: int):
    channels = {1: 16, 2: 48}[patch]
    shape = TinyDecoderShape(channels, patch=patch)
    with torch.device("meta"):
        state = TinyDecoder(shape).state_dict()
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    assert shapes == shape.parameters
    assert tiny_decoder_shape(shapes) == shape
    assert sum(t.numel() for t in state.values()) == {1: 9_844_611, 2: 9_923_532}[patch]


def vae_with(model: TinyDecoder) -> AutoencoderKLWan:
    vae = tiny_vae(z_dim=6, latents_mean=[0.0] * 6, latents_std=[1.0] * 6)
    vae.decoder = model
    assert isinstance(vae, AutoencoderKLWan)
    return vae


def test_a_video_is_the_same_bits_in_any_chunks_and_as_a_whole():
    model, latents, _ = decoder_of("taew2_1")
    vae = vae_with(model)
    whole, other = decode(vae, latents), torch.randn(latents.shape)
    streamed, meanwhile = StreamingDecoder(vae), StreamingDecoder(vae)
    parts = []
    for chunk in latents.split([1, 2], 2):
        parts.append(torch.from_numpy(streamed(chunk)))
        meanwhile(other)
    assert torch.equal(torch.cat(parts), torch.from_numpy(whole))
    with torch.no_grad():
        video = model(latents, model.empty_memory)
    assert torch.equal(to_pixels(video)[0], torch.from_numpy(whole))


def test_decoding_that_fails_can_be_repeated_with_its_memory_unchanged():
    model, latents, _ = decoder_of("taew2_1")
    streamed = StreamingDecoder(vae_with(model))
    first, second = latents.split([1, 2], 2)
    streamed(first)
    broken = second.clone()
    broken[0, 0, 0] = float("nan")
    with pytest.raises(Exception, match="not finite"):
        streamed(broken)
    whole = decode(vae_with(model), latents)
    assert torch.equal(torch.from_numpy(streamed(second)), torch.from_numpy(whole[1:]))


def test_a_pickle_and_safetensors_load_as_the_same_decoder(tmp_path: Path):
    tensors = {k: t for k, t in tensors_of("taew2_1").items() if k.startswith("decoder.")}
    tensors["encoder.0.weight"] = torch.zeros(1)  # which the authors' files have, too
    spec = ModelSpec("small", "", "", latent_channels=6)
    save_file(tensors, tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "b.pth")
    models = []
    for name in ("a.safetensors", "b.pth"):
        with_file = add_vae_decoder(spec, str(tmp_path / name))
        load = partial(load_tiny_decoder, dtype=torch.float32, device=torch.device("cpu"))
        models.append(load(with_file).state_dict())
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])
