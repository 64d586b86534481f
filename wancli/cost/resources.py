"""Resources that one video uses, for any family of models; `totals` sums them to a cost."""

from collections.abc import Mapping
from dataclasses import dataclass

from wancli.config.precision import LATENTS_PER_CALL, decoder_dtype, decodes_fast, vae_dtype
from wancli.config.settings import Machine
from wancli.cost.wan_transformer import Flops

WIDE, NARROW = 4, 2  # bytes per element


@dataclass(frozen=True)
class Precision:
    """Element sizes and memory options that a model runs with."""

    size: int  # bytes per element, except in the VAE
    vae: int  # bytes per element in the VAE
    decoder: int = WIDE  # bytes per element in the VAE's decoder
    latents_per_call: int = 1  # latent frames that the decoder takes at once, after the first
    quantized: bool = False  # 8-bit weights in the blocks
    fp8_products: bool = False  # 8-bit activations, too
    tiled: bool = False  # VAE tiling


@dataclass(frozen=True)
class WeightSizes:
    """Bytes of a part's weights on the device at once."""

    whole: int
    group: int  # under group offload
    layer: int  # under sequential offload


@dataclass(frozen=True)
class Usage:
    """Resources of one video, excluding caches."""

    parameters: Mapping[str, int]  # by part
    weight_sizes: Mapping[str, WeightSizes]  # by part
    tokens: int  # of one forward
    forwards: int
    work: Mapping[str, Flops]  # by phase
    memory_traffic: Mapping[str, int]  # elementwise bytes by phase, about; not the VAE's
    activations: Mapping[str, int]  # peak bytes by phase


def other_weight_sizes(
    parameters: Mapping[str, int], largest: Mapping[str, int], sizes: Mapping[str, int]
) -> dict[str, WeightSizes]:
    """Weight sizes of the encoders, given parameters of each part's `largest` layer.

    Group offload moves them layer by layer. `sizes` are bytes per element.
    """
    weights = {}
    for part, layer in largest.items():
        size = sizes[part]
        weights[part] = WeightSizes(parameters[part] * size, layer * size, layer * size)
    return weights


def vae_weight_sizes(
    precision: Precision, *, encoder: int, decoder: int, layer: int
) -> WeightSizes:
    """Weight sizes of a VAE, given its parameters and those of its largest layer."""
    whole = encoder * precision.vae + decoder * precision.decoder
    return WeightSizes(whole, whole, layer * max(precision.vae, precision.decoder))


def precision_of(machine: Machine, *, wide: bool, kind: str = "cpu") -> Precision:
    """Precision of these settings on a `kind` of device; `wide` is float32 weights, activations."""
    return Precision(
        size=WIDE if wide else NARROW,
        vae=WIDE if vae_dtype(machine) == "float32" else NARROW,
        decoder=WIDE if decoder_dtype(machine, kind) == "float32" else NARROW,
        latents_per_call=LATENTS_PER_CALL if decodes_fast(machine, kind) else 1,
        quantized=machine.quantize != "none",
        fp8_products=machine.quantize == "fp8-dynamic",
        tiled=machine.vae_tiling,
    )


PHASES = {
    "encode": ("text_encoder", "text_encoder_2", "image_encoder"),
    "denoise": ("transformer", "transformer_2"),
    "decode": ("vae",),
}


def resident_weights(
    parts: Mapping[str, WeightSizes], phase: str, offload: str, *, alternating: bool
) -> int:
    """Bytes of weights on the device in a phase.

    `alternating` is a rollout, which denoises and decodes chunk by chunk: model offload then keeps
    the VAE resident beside the transformer.
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
