"""The tiny decoder of TAEHV (https://github.com/madebyollin/taehv): its layers, from few sizes."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

Shape = tuple[int, ...]
EXACT, TINY = "exact", "tiny"  # values of the setting `vae_decoder`, beside files
DECODER = "vae_decoder"  # its name as a part of a model
LayerKind = Literal["clamp", "conv", "relu", "memory", "upsample", "grow"]
PREFIX = "decoder."  # of its keys in the authors' files; their encoder's begin otherwise
_COLORS = 3
_INDEX = re.compile(re.escape(PREFIX) + r"(\d+)\.(.+)")


class TinyLayer(NamedTuple):
    """One layer of the decoder; a `grow` makes out / in frames of each."""

    kind: LayerKind
    channels_in: int
    channels_out: int
    bias: bool = True


@dataclass(frozen=True)
class TinyDecoderShape:
    """Sizes of a tiny decoder: each level doubles height and width and may multiply the frames."""

    latent_channels: int
    widths: tuple[int, ...] = (256, 128, 64, 64)  # channels of each level, and after the last
    growth: tuple[int, ...] = (1, 2, 2)  # frames of each level for one before it
    blocks: int = 3  # memory blocks of each level
    patch: int = 1  # pixels, each way, of one output

    @property
    def temporal(self) -> int:
        """Video frames per latent frame."""
        return prod(self.growth)

    @property
    def spatial(self) -> int:
        """Pixels per latent, in height and width."""
        return self.patch * int(2 ** len(self.growth))

    @property
    def layers(self) -> list[TinyLayer]:
        """The layers, in the order and with the indices of the authors' checkpoints."""
        first = self.widths[0]
        layers = [
            TinyLayer("clamp", self.latent_channels, self.latent_channels),
            TinyLayer("conv", self.latent_channels, first),
            TinyLayer("relu", first, first),
        ]
        for width, after, growth in zip(self.widths, self.widths[1:], self.growth, strict=False):
            layers += [TinyLayer("memory", width, width)] * self.blocks
            layers += [
                TinyLayer("upsample", width, width),
                TinyLayer("grow", width, growth * width, bias=False),
                TinyLayer("conv", width, after, bias=False),
            ]
        last = self.widths[-1]
        colors = _COLORS * self.patch**2
        return [*layers, TinyLayer("relu", last, last), TinyLayer("conv", last, colors)]

    @property
    def parameters(self) -> dict[str, Shape]:
        """Shape of every parameter, by the authors' key."""
        return {
            f"{PREFIX}{index}.{name}": shape
            for index, layer in enumerate(self.layers)
            for name, shape in _layer_parameters(layer)
        }


# Of the demo model's VAE; trained by wancli/demo/tiny_decoder.py.
DEMO_SHAPE = TinyDecoderShape(8, widths=(44, 28, 20), growth=(2, 2), blocks=2, patch=2)


def _layer_parameters(layer: TinyLayer) -> Iterator[tuple[str, Shape]]:
    kind, inputs, outputs, bias = layer
    if kind == "grow":
        yield "conv.weight", (outputs, inputs, 1, 1)
    if kind == "memory":
        for number, channels in ((0, 2 * inputs), (2, outputs), (4, outputs)):
            yield f"conv.{number}.weight", (outputs, channels, 3, 3)
            yield f"conv.{number}.bias", (outputs,)
    if kind == "conv":
        yield "weight", (outputs, inputs, 3, 3)
        if bias:
            yield "bias", (outputs,)


def tiny_decoder_shape(shapes: Mapping[str, Shape]) -> TinyDecoderShape | None:
    """The sizes of the decoder in a checkpoint, by the shapes of its keys; None if it has none.

    Keys may be missing or left over: compare them with `parameters`.
    """
    layers = _by_index(shapes)
    memory = sorted(index for index, names in layers.items() if "conv.0.weight" in names)
    growing = sorted(index for index, names in layers.items() if "conv.weight" in names)
    convolutions = [layers[i]["weight"] for i in sorted(layers) if "weight" in layers[i]]
    square = all(len(shape) == 4 and 0 not in shape for shape in convolutions)
    if not memory or not growing or len(convolutions) != len(growing) + 2 or not square:
        return None
    grows = [layers[index]["conv.weight"] for index in growing]
    if any(len(shape) != 4 or 0 in shape for shape in grows):
        return None
    return TinyDecoderShape(
        convolutions[0][1],
        widths=tuple(shape[0] for shape in convolutions[:-1]),
        growth=tuple(shape[0] // shape[1] for shape in grows),
        blocks=len(memory) // len(growing),
        patch=round((convolutions[-1][0] / _COLORS) ** 0.5),
    )


def _by_index(shapes: Mapping[str, Shape]) -> dict[int, dict[str, Shape]]:
    """The decoder's parameters of each layer, by name."""
    layers: dict[int, dict[str, Shape]] = {}
    for key, shape in shapes.items():
        if match := _INDEX.fullmatch(key):
            layers.setdefault(int(match[1]), {})[match[2]] = shape
    return layers
