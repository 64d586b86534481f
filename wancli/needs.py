"""What one video takes of a model of any kind: what a cost is summed up from."""

from collections.abc import Mapping
from dataclasses import dataclass

from wancli.machine import vae_dtype
from wancli.settings import Machine
from wancli.transformer_cost import Work

WIDE, NARROW = 4, 2  # bytes of a number


@dataclass(frozen=True)
class Numbers:
    """What a model computes in, and how."""

    size: int  # bytes of one, but for those of the VAE
    vae: int  # bytes of one of the VAE's
    quantized: bool = False  # the weights of the blocks are in 8 bits
    tiled: bool = False  # the VAE works in tiles


@dataclass(frozen=True)
class Pieces:
    """Bytes of a part's weights that are on the device at once."""

    whole: int
    group: int  # under group offload
    layer: int  # under sequential offload


@dataclass(frozen=True)
class Needs:
    """What one video takes, without caches."""

    parameters: Mapping[str, int]  # by part
    pieces: Mapping[str, Pieces]  # the same
    tokens: int  # of one forward
    forwards: int
    work: Mapping[str, Work]  # by phase
    moved: Mapping[str, int]  # bytes read and written element by element, about; not the VAE's
    activations: Mapping[str, int]  # bytes at most, by phase


def other_pieces(
    parameters: Mapping[str, int], largest: Mapping[str, int], sizes: Mapping[str, int]
) -> dict[str, Pieces]:
    """Of the parts that are no transformers, those of `largest`: parameters of a layer.

    Group offload leaves the VAE where it is, and takes encoders by layer. `sizes` are bytes of a
    number.
    """
    found = {}
    for part, layer in largest.items():
        size = sizes[part]
        whole = parameters[part] * size
        found[part] = Pieces(whole, whole if part == "vae" else layer * size, layer * size)
    return found


def numbers_of(machine: Machine, *, wide: bool) -> Numbers:
    """Those that the settings come to where weights and activations are `wide`, or are not."""
    return Numbers(
        size=WIDE if wide else NARROW,
        vae=WIDE if vae_dtype(machine) == "float32" else NARROW,
        quantized=machine.quantize != "none",
        tiled=machine.vae_tiling,
    )
