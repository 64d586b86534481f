"""The closed forms equal the parameters and FLOPs of diffusers' VAE."""

import pytest
import torch

from tests.fakes import tiny_vae
from tests.shapes import flops, parameters, peak_bytes, vae
from wancli.catalog.geometry import STRIDE, TILE
from wancli.catalog.wan import DEMO, VAE_2_2, Autoencoder
from wancli.cost.wan_vae import (
    Grid,
    decode_bytes,
    decode_flops,
    decoder,
    decoder_parameters,
    encode_flops,
    largest_layer,
    tiled_decode_bytes,
    tiles,
    vae_parameters,
)
from wancli.models.fast_decoder import DecoderSpeedups, speed_up_decoder
from wancli.models.vae import StreamingDecoder

VAE_2_1 = Autoencoder()
TINY = Autoencoder(4, 4, 4, (1, 1, 1, 1), 1)
SHAPES = {"2.1": VAE_2_1, "2.2": VAE_2_2, "demo": DEMO.vae, "tiny": TINY}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@shapes
def test_parameters_match_the_class(shape: Autoencoder):
    model = vae(shape)
    assert vae_parameters(shape) == parameters(model)
    assert decoder_parameters(shape) == parameters(model.decoder)


@pytest.mark.parametrize(
    ("shape", "frames"),
    [(TINY, 1), *((shape, 3) for shape in SHAPES.values())],
    ids=["tiny, one frame", *SHAPES],
)
def test_flops_match_those_torch_counts(shape: Autoencoder, frames: int):
    model, grid = vae(shape), Grid(frames, 4, 6)
    latents = torch.empty(1, shape.latent_channels, frames, 4, 6, device="meta")
    assert decode_flops(shape, grid).flops == flops(lambda: model.decode(latents))
    size = (4 * frames - 3, 4 * shape.spatial, 6 * shape.spatial)
    video = torch.empty(1, 3, *size, device="meta")
    assert encode_flops(shape, grid).flops == flops(lambda: model.encode(video))


@pytest.mark.parametrize(
    ("shape", "height", "width", "first", "steady"),
    [
        (VAE_2_1, 480, 832, 4.35, 13.55),
        (VAE_2_1, 720, 1280, 10.2, 31.45),
        (VAE_2_2, 704, 1280, 20.6, 66.35),
    ],
)
def test_teraflops_of_a_latent_frame(
    shape: Autoencoder, height: int, width: int, first: float, steady: float
):
    teraflops = [
        decode_flops(shape, Grid(n, height // shape.spatial, width // shape.spatial)).flops / 1e12
        for n in (1, 2)
    ]
    assert teraflops[0] == pytest.approx(first, rel=0.003)
    assert teraflops[1] - teraflops[0] == pytest.approx(steady, rel=0.003)


def test_cached_features_match_the_streaming_decoder():
    stream = StreamingDecoder(tiny_vae())
    stream(torch.zeros(1, 4, 3, 2, 3))
    cached = sum(layer.cached for layer in decoder(TINY, Grid(1, 2, 3), first=False))
    assert stream.nbytes == 4 * cached


@pytest.mark.parametrize(("name", "frames"), [("2.1", 1), ("2.1", 3), ("2.2", 3), ("demo", 3)])
def test_peak_memory_of_decoding_matches_the_formula(name: str, frames: int):
    shape, grid = SHAPES[name], Grid(frames, 30, 52)
    model = vae(shape)
    latents = torch.empty(1, shape.latent_channels, frames, 30, 52, device="meta")
    peak = peak_bytes(model, lambda: model.decode(latents))
    assert decode_bytes(shape, grid) == pytest.approx(peak, rel=0.2)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["exact", "fast"])
@pytest.mark.parametrize("frames", [1, pytest.param(5, marks=pytest.mark.slow), 6])
@pytest.mark.parametrize("name", ["2.1", "2.2"])
def test_peak_memory_of_streaming_matches_the_formula(
    name: str, frames: int, dtype: torch.dtype | None
):
    shape, grid = SHAPES[name], Grid(frames, 30, 52)
    model, channels = vae(shape), shape.latent_channels
    if dtype:
        speed_up_decoder(model, DecoderSpeedups(dtype=dtype))
    model.register_to_config(latents_mean=[0.0] * channels, latents_std=[1.0] * channels)
    decoder = StreamingDecoder(model)

    def decode() -> None:
        for part in torch.empty(1, channels, frames, 30, 52, device="meta").split(3, 2):
            decoder.frames(part)

    per_call, size = (3, dtype.itemsize) if dtype else (1, 4)
    peak = peak_bytes(model, decode, fused=[torch.nn.functional.rms_norm])
    planned = decode_bytes(shape, grid, chunk=3, latents_per_call=per_call, element_bytes=size)
    assert planned == pytest.approx(peak, rel=0.2)


@pytest.mark.parametrize(
    ("channels", "frames", "height", "small"),
    [(64, 2, 24, True), (96, 4, 32, True), (384, 1, 16, False), (96, 4, 34, False)],
)
def test_small_convolutions_are_those_torch_runs_as_slow_conv3d(
    channels: int, frames: int, height: int, small: bool
):
    padded = torch.zeros(1, channels, frames + 2, height + 2, 6)
    kernel = torch.zeros(channels, channels, 3, 3, 3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.nn.functional.conv3d(padded, kernel)
    assert any("slow_conv3d" in event.key for event in profile.key_averages()) is small
    grid = Grid(frames, height, 4)
    vae = Autoencoder(channels, channels, 4, (1,), 1, ())
    layers = {layer.parameters: layer.work for layer in decoder(vae, grid, first=False)}
    assert bool(layers[27 * channels**2 + channels].small_convolution) is small


@pytest.mark.slow
@pytest.mark.parametrize("frames", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_peak_memory_and_flops_of_tiled_decoding_match_the_formulas(frames: int):
    shape, grid = VAE_2_1, Grid(frames, 40, 60)
    assert (
        len({(t.height, t.width) for t in tiles(grid, shape.spatial)}) == 4
    )  # smaller at the ends
    model = vae(shape)
    model.enable_tiling()
    assert (model.tile_sample_min_width, model.tile_sample_stride_width) == (TILE, STRIDE)
    latents = torch.empty(1, shape.latent_channels, frames, 40, 60, device="meta")
    peak = peak_bytes(model, lambda: model.decode(latents))
    assert tiled_decode_bytes(shape, grid) == pytest.approx(peak, rel=0.1)
    assert peak < decode_bytes(shape, grid) / 2
    work = sum(decode_flops(shape, tile).flops for tile in tiles(grid, shape.spatial))
    assert work == flops(lambda: model.decode(latents))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["2.1", "demo"])
def test_flops_of_tiled_encoding_match_the_formula(name: str):
    shape, grid = SHAPES[name], Grid(2, 70, 40)
    model = vae(shape)
    model.enable_tiling()
    size = (5, 70 * shape.spatial, 40 * shape.spatial)
    video = torch.empty(1, 3, *size, device="meta")
    grids = tiles(grid, shape.spatial, pixels=TILE * shape.patch)
    assert len(grids) > 1
    assert sum(encode_flops(shape, tile).flops for tile in grids) == flops(
        lambda: model.encode(video)
    )


def test_a_video_of_one_tile_is_not_tiled():
    assert tiles(Grid(3, 32, 32), 8) == [Grid(3, 32, 32)]
    assert tiled_decode_bytes(VAE_2_1, Grid(3, 32, 32)) == decode_bytes(VAE_2_1, Grid(3, 32, 32))


def test_the_largest_layer_matches_the_class():
    for shape in SHAPES.values():
        largest = max(
            sum(p.numel() for p in m.parameters(recurse=False)) for m in vae(shape).modules()
        )
        assert largest_layer(shape) == largest
