"""Parameters, FLOPs and memory of a Wan VAE, in closed form: a walk through its layers.

The VAE processes one latent frame at a time: the first is one video frame, every other as many as
the temporal stride. Causal convolutions cache their last input frames (diffusers' `feat_cache`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from wancli.catalog.geometry import STRIDE, TILE
from wancli.catalog.wan import Autoencoder
from wancli.cost.wan_transformer import NO_FLOPS, Flops

CAUSAL, FLAT, IN_TIME = 27, 9, 3  # kernel taps: 3x3x3, 1x3x3, 3x1x1
CACHE_FRAMES = 2  # input frames that a causal convolution caches (diffusers' CACHE_T)
# Channels * frames * rows of a convolution's input. Up to this size torch on a CPU uses im2col and
# a matrix product, which is two to four times slower than oneDNN (ATen's use_mkldnn).
MKLDNN_MIN_INPUT = 20_480
PEAK_COPIES = 6.75  # of the largest input; see decode_bytes
FAST_PEAK_COPIES = 5.5  # of the fast decoder, which activates in place and pads once
BLEND_COPIES = 3  # copies of the video while tiles are blended


@dataclass(frozen=True)
class VaeLayer:
    """Cost of one layer on one latent frame."""

    parameters: int = 0
    work: Flops = NO_FLOPS
    cached: int = 0  # elements cached for the next latent frame
    input: int = 0  # elements of its input


@dataclass(frozen=True)
class Grid:
    """Frames, height and width of the features at one place in the network."""

    frames: int
    height: int
    width: int

    @property
    def cells(self) -> int:
        """Positions in all frames."""
        return self.frames * self.height * self.width

    def scaled(self, *, space: float = 1, time: float = 1) -> "Grid":
        """The grid, scaled in space or time."""
        return Grid(int(self.frames * time), int(self.height * space), int(self.width * space))


def vae_parameters(vae: Autoencoder) -> int:
    """Parameters of the whole VAE."""
    grid, z = Grid(1, 2 ** len(vae.temporal), 2 ** len(vae.temporal)), vae.latent_channels
    walks = (encoder(vae, grid, first=True), decoder(vae, grid, first=True))
    ends = (4 * z * z + 2 * z) + (z * z + z)  # 1x1 convolutions
    return sum(layer.parameters for walk in walks for layer in walk) + ends


def decoder_parameters(vae: Autoencoder) -> int:
    """Parameters of the decoder alone."""
    grid = Grid(1, 2 ** len(vae.temporal), 2 ** len(vae.temporal))
    return sum(layer.parameters for layer in decoder(vae, grid, first=True))


def largest_layer(vae: Autoencoder) -> int:
    """Parameters of the largest layer."""
    grid = Grid(1, 2 ** len(vae.temporal), 2 ** len(vae.temporal))
    walks = (encoder(vae, grid, first=True), decoder(vae, grid, first=True))
    return max(layer.parameters for walk in walks for layer in walk)


def tiles(latents: Grid, spatial: int, *, pixels: int = TILE) -> list[Grid]:
    """Overlapping tiles, in latents, that diffusers splits a video into; a small video is one tile.

    `spatial` is pixels per latent, each way.
    """
    tile, stride = pixels // spatial, pixels * STRIDE // TILE // spatial
    if latents.height <= tile and latents.width <= tile:
        return [latents]
    return [
        Grid(latents.frames, min(tile, latents.height - y), min(tile, latents.width - x))
        for y in range(0, latents.height, stride)
        for x in range(0, latents.width, stride)
    ]


def decode_flops(vae: Autoencoder, latents: Grid) -> Flops:
    """FLOPs of decoding all latents to pixels."""
    one = Grid(1, latents.height, latents.width)
    first = _work(decoder(vae, one, first=True))
    rest = _work(decoder(vae, one, first=False)) * (latents.frames - 1)
    return first + rest + Flops(convolution=2 * latents.cells * vae.latent_channels**2)


def encode_flops(vae: Autoencoder, latents: Grid) -> Flops:
    """FLOPs of encoding all pixels to latents."""
    stride = 2 ** sum(vae.temporal)
    one = Grid(1, latents.height, latents.width).scaled(space=vae.spatial // vae.patch)
    first = _work(encoder(vae, one, first=True))
    rest = _work(encoder(vae, one.scaled(time=stride), first=False)) * (latents.frames - 1)
    return first + rest + Flops(convolution=2 * latents.cells * 4 * vae.latent_channels**2)


def decode_bytes(
    vae: Autoencoder, latents: Grid, *, chunk: int = 0, latents_per_call: int = 1,
    element_bytes: int = 4, video_bytes: int = 4,
) -> int:  # fmt: skip
    """Approximate peak bytes of decoding a video, excluding weights.

    The feature cache, the video so far and, at the largest convolution of a residual block: its
    input, the activation, that concatenated with cached frames, that again zero-padded, and its new
    cache. A StreamingDecoder decodes a `chunk` of latent frames (0: all) and keeps the cache before
    it meanwhile. The fast decoder takes several latents per call. Elements are of `element_bytes`,
    those of the video of `video_bytes`.
    """
    later = 0 < chunk < latents.frames  # not only the first chunk
    shown = replace(latents, frames=chunk if later else latents.frames)
    layers = list(decoder(vae, replace(latents, frames=1), first=latents.frames == 1))
    video = video_bytes * _video(vae, shown)
    cached = sum(layer.cached for layer in layers) * (2 if later else 1)
    cached //= CACHE_FRAMES if latents.frames == 1 else 1
    largest = max(layer.input for layer in layers if layer.cached)
    most = min(chunk, latents.frames - chunk) if later else latents.frames - 1
    at_once = max(1, min(latents_per_call, most))
    copies = PEAK_COPIES if latents_per_call == 1 else FAST_PEAK_COPIES * at_once
    return int(max(element_bytes * (copies * largest + cached) + video, 3 * video))


def tiled_decode_bytes(
    vae: Autoencoder, latents: Grid, *, element_bytes: int = 4, video_bytes: int = 4
) -> int:
    """The same for one tile plus the tiles decoded before; at the end, all blended."""
    cut, sizes = tiles(latents, vae.spatial), {"element_bytes": element_bytes}
    one_tile = decode_bytes(vae, cut[0], **sizes, video_bytes=video_bytes)
    if len(cut) == 1:
        return one_tile
    videos = [_video(vae, tile) for tile in cut]
    blended = sum(videos) + BLEND_COPIES * _video(vae, latents)
    return max(one_tile + video_bytes * sum(videos[1:]), video_bytes * blended)


def _video(vae: Autoencoder, latents: Grid) -> int:
    """Elements of the decoded video."""
    stride: int = 2 ** sum(vae.temporal)
    frames = 1 + stride * (latents.frames - 1)
    return 3 * frames * latents.height * latents.width * vae.spatial**2


def decoder(vae: Autoencoder, grid: Grid, *, first: bool) -> Iterator[VaeLayer]:
    """Layers of the decoder, on one latent frame."""
    dims = [vae.decoder_dim * m for m in (vae.multipliers[-1], *reversed(vae.multipliers))]
    yield _causal(vae.latent_channels, dims[0], grid)
    yield from _middle(dims[0], grid)
    last = len(vae.multipliers) - 1
    for level, (inp, out) in enumerate(pairwise(dims)):
        width = inp // 2 if level and not vae.residual else inp
        yield from _blocks(width, out, vae.res_blocks + 1, grid)
        if level == last:
            break
        if vae.temporal[last - 1 - level]:
            yield _convolution(out, 2 * out, IN_TIME, Grid(0, 0, 0) if first else grid, caches=True)
            grid = grid if first else grid.scaled(time=2)
        grid = grid.scaled(space=2)
        yield _convolution(out, out if vae.residual else out // 2, FLAT, grid)
    yield VaeLayer(parameters=dims[-1])
    yield _causal(dims[-1], vae.pixel_channels, grid)


def encoder(vae: Autoencoder, grid: Grid, *, first: bool) -> Iterator[VaeLayer]:
    """Layers of the encoder, on the video frames of one latent frame."""
    dims = [vae.encoder_dim * m for m in (1, *vae.multipliers)]
    yield _causal(vae.pixel_channels, dims[0], grid)
    last = len(vae.multipliers) - 1
    for level, (inp, out) in enumerate(pairwise(dims)):
        yield from _blocks(inp, out, vae.res_blocks, grid)
        if level == last:
            break
        grid = grid.scaled(space=0.5)
        yield _convolution(out, out, FLAT, grid)
        if vae.temporal[level]:
            grid = grid if first else grid.scaled(time=0.5)
            yield _convolution(out, out, IN_TIME, Grid(0, 0, 0) if first else grid)
    yield from _middle(dims[-1], grid)
    yield VaeLayer(parameters=dims[-1])
    yield _causal(dims[-1], 2 * vae.latent_channels, grid)


def _convolution(inp: int, out: int, taps: int, grid: Grid, *, caches: bool = False) -> VaeLayer:
    flops = 2 * taps * inp * out * grid.cells
    flat = taps == FLAT  # frame by frame
    small = not flat and inp * (grid.frames + 2) * (grid.height + 2) <= MKLDNN_MIN_INPUT
    return VaeLayer(
        parameters=taps * inp * out + out,
        work=Flops(small_convolution=flops) if small else Flops(convolution=flops),
        cached=CACHE_FRAMES * inp * grid.height * grid.width if caches else 0,
        input=inp * grid.cells,
    )


def _causal(inp: int, out: int, grid: Grid) -> VaeLayer:
    return _convolution(inp, out, CAUSAL, grid, caches=True)


def _blocks(inp: int, out: int, count: int, grid: Grid) -> Iterator[VaeLayer]:
    """Residual blocks: norm, convolution, norm, convolution, and a shortcut."""
    for _ in range(count):
        yield VaeLayer(parameters=inp + out)
        yield _causal(inp, out, grid)
        yield _causal(out, out, grid)
        if inp != out:
            yield _convolution(inp, out, 1, grid)
        inp = out


def _middle(dim: int, grid: Grid) -> Iterator[VaeLayer]:
    """Two residual blocks around per-frame attention."""
    yield from _blocks(dim, dim, 2, grid)
    yield VaeLayer(parameters=dim)
    yield _convolution(dim, 3 * dim, 1, grid)
    yield VaeLayer(work=Flops(attention=4 * dim * grid.cells * grid.height * grid.width))
    yield _convolution(dim, dim, 1, grid)


def _work(layers: Iterator[VaeLayer]) -> Flops:
    return sum((layer.work for layer in layers), NO_FLOPS)
