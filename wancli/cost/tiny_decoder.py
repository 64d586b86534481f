"""FLOPs and memory of a tiny decoder, in closed form: a walk through its layers."""

from collections.abc import Iterator
from math import prod

from wancli.catalog.tiny_decoder import TinyDecoderShape, TinyLayer
from wancli.cost.wan_transformer import NO_FLOPS, Flops
from wancli.cost.wan_vae import FLAT, Grid

_MEMORY_TAPS = 4 * FLAT  # of its three convolutions, the first of which reads twice the channels
_MEMORY_COPIES = 5  # of a memory block's input: frames before it, both together, two activations
_VIDEO_COPIES = 4.75  # of the parts, joined, checked and clamped


def tiny_parameters(shape: TinyDecoderShape) -> int:
    """Parameters of the decoder."""
    return sum(prod(size) for size in shape.parameters.values())


def tiny_largest_layer(shape: TinyDecoderShape) -> int:
    """Parameters of the largest layer."""
    return max(prod(size) for size in shape.parameters.values())


def tiny_flops(shape: TinyDecoderShape, latents: Grid) -> Flops:
    """FLOPs of decoding all latents to pixels."""
    work = NO_FLOPS
    for taps, channels, cells, _ in _walk(shape, latents):
        work += Flops(convolution=2 * taps * channels * cells)
    return work * latents.frames


def tiny_bytes(
    shape: TinyDecoderShape, latents: Grid, *, chunk: int, element_bytes: int, video_bytes: int
) -> int:
    """Approximate peak bytes of decoding `chunk` latent frames after another, excluding weights.

    The memory of the blocks, before and after the chunk, and either the activations of the largest
    layer beside the video so far, or the chunk's video while it becomes levels.
    """
    later = chunk < latents.frames  # not only the first chunk
    kept = element_bytes * sum(
        layer.channels_in * grid.height * grid.width
        for layer, grid in _grids(shape, latents)
        if layer.kind == "memory"
    )
    frames = shape.temporal * (chunk if later else latents.frames - 1) + (0 if later else 1)
    video = 3 * frames * latents.height * latents.width * shape.spatial**2 * video_bytes
    active = element_bytes * max(active for *_, active in _walk(shape, latents))
    return (2 if later else 1) * kept + int(max(active + video, _VIDEO_COPIES * video))


def _walk(shape: TinyDecoderShape, latents: Grid) -> Iterator[tuple[int, int, int, int]]:
    """Kernel taps, channels in times out, positions and elements in use of each layer, a frame."""
    for layer, grid in _grids(shape, latents):
        channels, cells = layer.channels_in * layer.channels_out, grid.cells
        ends = (layer.channels_in + layer.channels_out) * cells
        if layer.kind == "memory":
            yield _MEMORY_TAPS, channels, cells, _MEMORY_COPIES * layer.channels_in * cells
        elif layer.kind == "upsample":
            yield 0, 0, cells, layer.channels_in * (cells + grid.scaled(space=2).cells)
        else:
            taps = {"conv": FLAT, "grow": 1}.get(layer.kind, 0)
            yield taps, channels, cells, ends


def _grids(shape: TinyDecoderShape, latents: Grid) -> Iterator[tuple[TinyLayer, Grid]]:
    """Each layer, and the size of its input for one latent frame."""
    grid = Grid(1, latents.height, latents.width)
    for layer in shape.layers:
        yield layer, grid
        if layer.kind == "upsample":
            grid = grid.scaled(space=2)
        if layer.kind == "grow":
            grid = grid.scaled(time=layer.channels_out // layer.channels_in)
