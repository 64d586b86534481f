import pytest
import torch

from tests.fakes import tiny_vae
from tests.shapes import flops, parameters, peak_bytes
from wancli.catalog.tiny_decoder import DEMO_SHAPE, TinyDecoderShape
from wancli.cost.tiny_decoder import tiny_bytes, tiny_flops, tiny_largest_layer, tiny_parameters
from wancli.cost.wan_vae import Grid
from wancli.models.tiny_decoder import TinyDecoder
from wancli.models.vae import StreamingDecoder

SHAPES = {"2.1": TinyDecoderShape(16), "2.2": TinyDecoderShape(48, patch=2), "demo": DEMO_SHAPE}


def decoder(name: str) -> TinyDecoder:
    with torch.device("meta"):
        return TinyDecoder(SHAPES[name])


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_and_flops_match_the_class(name: str):
    shape, model = SHAPES[name], decoder(name)
    latents = torch.empty(1, shape.latent_channels, 3, 4, 6, device="meta")
    assert tiny_parameters(shape) == parameters(model)
    assert tiny_largest_layer(shape) == max(p.numel() for p in model.parameters())
    counted = flops(lambda: model(latents, model.empty_memory))
    assert tiny_flops(shape, Grid(3, 4, 6)).flops == counted


@pytest.mark.parametrize("frames", [1, 6])
@pytest.mark.parametrize("name", SHAPES)
def test_peak_memory_of_streaming_matches_the_formula(name: str, frames: int):
    shape, grid = SHAPES[name], Grid(frames, 30, 52)
    channels = shape.latent_channels
    vae = tiny_vae(z_dim=channels, latents_mean=[0.0] * channels, latents_std=[1.0] * channels)
    vae.to("meta").decoder = decoder(name)
    streaming = StreamingDecoder(vae)

    def decode() -> None:
        for part in torch.empty(1, channels, frames, 30, 52, device="meta").split(3, 2):
            streaming.frames(part)

    planned = tiny_bytes(shape, grid, chunk=3, element_bytes=4, video_bytes=4)
    peak = peak_bytes(vae, decode)
    assert planned == pytest.approx(peak, rel=0.2)
