"""What waits in RAM while the device computes with the rest: the ways, the rules, the bytes."""

from collections.abc import Mapping
from dataclasses import dataclass

from wancli.architectures import Architecture
from wancli.errors import PlanError
from wancli.settings import Machine, Settings
from wancli.step_caches import STEP_CACHES
from wancli.tasks import Task
from wancli.transformer_cost import block_parameters
from wancli.vae_cost import TILE, largest_layer

# What is on the device at once, the fastest first.
OFFLOADS = {
    "none": "all parts",
    "model": "one part after the other",
    "group": "one block after the other, and the VAE",
    "sequential": "one layer after the other",
}
PHASES = {
    "encode": ("text_encoder", "image_encoder"),
    "denoise": ("transformer", "transformer_2"),
    "decode": ("vae",),
}


@dataclass(frozen=True)
class Pieces:
    """Bytes of a part's weights that are on the device at once."""

    whole: int
    group: int  # under group offload
    layer: int  # under sequential offload


def offloads(settings: Settings, task: Task) -> tuple[str, ...]:
    """Those that go together with the rest. Raises PlanError where the one asked for does not."""
    asked, method = settings.machine.offload, settings.step_cache.step_cache
    way = f"--offload {asked}"
    if settings.prompt_kv.free_kv_weights:
        refused = PlanError(
            f"--free-kv-weights and {way} both move weights, each behind the other's back.",
            hint=f"drop --free-kv-weights: {way} spares more",
        )
    elif method == "cachedit" and STEP_CACHES[task.transformer].functor:
        refused = PlanError(
            f"--use-cachedit and {way} both replace the forward of {task.transformer}.",
            hint="--offload none, or --step-cache none",
        )
    else:
        return tuple(OFFLOADS)
    if asked not in ("auto", "none"):
        raise refused
    return ("none",)


def check_tiling(settings: Settings) -> None:
    """Raise PlanError where the video is smaller than a tile, and nothing would be cut."""
    video = settings.video
    if settings.machine.vae_tiling and max(video.width, video.height) <= TILE:
        raise PlanError(
            f"--vae-tiling does nothing at {video.width}x{video.height}: a tile is {TILE}x{TILE}.",
            hint="drop --vae-tiling",
        )


def check_rollout_vae(machine: Machine) -> None:
    """Raise PlanError where a rollout's VAE, which decodes chunk by chunk, is to work in tiles."""
    if machine.vae_tiling:
        raise PlanError(
            "--vae-tiling does not reach rollouts: their VAE goes on from chunk to chunk, whole.",
            hint="drop --vae-tiling, or --vae-dtype bfloat16",
        )


def pieces(
    shapes: Architecture, weights: Mapping[str, int], element_bytes: Mapping[str, int]
) -> dict[str, Pieces]:
    """Of every part: its weights in bytes are given, and the bytes of one of its numbers."""
    t, e, i = shapes.transformer, shapes.text_encoder, shapes.image_encoder
    largest = {
        "text_encoder": e.vocabulary * e.dim,
        "image_encoder": i.dim * i.ffn if i else 0,
        "vae": largest_layer(shapes.vae),
    }
    found = {}
    for part, whole in weights.items():
        size = element_bytes[part]
        if part in PHASES["denoise"]:
            # Beside a block there is what stands before and after them all.
            group = whole - (t.layers + t.vace_blocks - 1) * block_parameters(t) * size
            found[part] = Pieces(whole, group, t.dim * max(t.ffn, 6 * t.dim) * size)
        else:
            layer = largest[part] * size
            found[part] = Pieces(whole, whole if part == "vae" else layer, layer)
    return found


def held_weights(
    parts: Mapping[str, Pieces], phase: str, offload: str, *, alternating: bool
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
