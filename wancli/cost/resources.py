"""What one video takes of a model of any kind: what a cost is summed up from."""

from collections.abc import Mapping
from dataclasses import dataclass

from wancli.config.precision import vae_dtype
from wancli.config.settings import Machine
from wancli.cost.wan_transformer import Flops

WIDE, NARROW = 4, 2  # bytes of a number


@dataclass(frozen=True)
class Precision:
    """What a model computes in, and how."""

    size: int  # bytes of one, but for those of the VAE
    vae: int  # bytes of one of the VAE's
    quantized: bool = False  # the weights of the blocks are in 8 bits
    tiled: bool = False  # the VAE works in tiles


@dataclass(frozen=True)
class WeightSizes:
    """Bytes of a part's weights that are on the device at once."""

    whole: int
    group: int  # under group offload
    layer: int  # under sequential offload


@dataclass(frozen=True)
class Usage:
    """What one video takes, without caches."""

    parameters: Mapping[str, int]  # by part
    pieces: Mapping[str, WeightSizes]  # the same
    tokens: int  # of one forward
    forwards: int
    work: Mapping[str, Flops]  # by phase
    moved: Mapping[str, int]  # bytes read and written element by element, about; not the VAE's
    activations: Mapping[str, int]  # bytes at most, by phase


def other_pieces(
    parameters: Mapping[str, int], largest: Mapping[str, int], sizes: Mapping[str, int]
) -> dict[str, WeightSizes]:
    """Of the parts that are no transformers, those of `largest`: parameters of a layer.

    Group offload leaves the VAE where it is, and takes encoders by layer. `sizes` are bytes of a
    number.
    """
    found = {}
    for part, layer in largest.items():
        size = sizes[part]
        whole = parameters[part] * size
        found[part] = WeightSizes(whole, whole if part == "vae" else layer * size, layer * size)
    return found


def precision_of(machine: Machine, *, wide: bool) -> Precision:
    """Those that the settings come to where weights and activations are `wide`, or are not."""
    return Precision(
        size=WIDE if wide else NARROW,
        vae=WIDE if vae_dtype(machine) == "float32" else NARROW,
        quantized=machine.quantize != "none",
        tiled=machine.vae_tiling,
    )


PHASES = {
    "encode": ("text_encoder", "text_encoder_2", "image_encoder"),
    "denoise": ("transformer", "transformer_2"),
    "decode": ("vae",),
}


def held_weights(
    parts: Mapping[str, WeightSizes], phase: str, offload: str, *, alternating: bool
) -> int:
    """Bytes of weights on the device in a phase.

    `alternating` is a rollout, where each chunk is denoised and decoded: model offload then leaves
    the VAE beside the transformer.
    """
    if offload == "none":
        return sum(part.whole for part in parts.values())
    own = [part for name, part in parts.items() if name in PHASES[phase]]
    if offload == "sequential":
        return max(part.layer for part in own)
    if offload == "group":
        return (
            max((part.group for part in own if phase != "decode"), default=0) + parts["vae"].whole
        )
    if not alternating:
        return max(part.whole for part in own)
    if phase == "decode":
        own = [part for name, part in parts.items() if name in PHASES["denoise"]]
    return max(part.whole for part in own) + parts["vae"].whole
