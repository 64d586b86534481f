"""What waits in RAM while the device computes with the rest: the ways, the rules, the bytes."""

from collections.abc import Mapping

from wancli.errors import PlanError
from wancli.needs import Pieces
from wancli.settings import Machine, Settings
from wancli.step_caches import STEP_CACHES
from wancli.tasks import Task
from wancli.vae_cost import TILE

# What is on the device at once, the fastest first.
OFFLOADS = {
    "none": "all parts",
    "model": "one part after the other",
    "group": "one block after the other, and the VAE",
    "sequential": "one layer after the other",
}
PHASES = {
    "encode": ("text_encoder", "text_encoder_2", "image_encoder"),
    "denoise": ("transformer", "transformer_2"),
    "decode": ("vae",),
}


def offloads(settings: Settings, task: Task) -> tuple[str, ...]:
    """Those that go together with the rest. Raises PlanError where the one asked for does not."""
    asked, method = settings.machine.offload, settings.step_cache.step_cache
    way, possible = f"--offload {asked}", ["none"]
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
    elif settings.machine.compile:
        possible = ["none", "model"]
        refused = PlanError(
            f"{way} brings weights from inside the blocks, which --compile makes one graph each.",
            hint="--offload model, or --no-compile",
        )
    else:
        return tuple(OFFLOADS)
    if asked not in ("auto", *possible):
        raise refused
    return tuple(possible)


def check_tiling(settings: Settings) -> None:
    """Raise PlanError where the video is smaller than a tile, and nothing would be cut."""
    video = settings.video
    if settings.machine.vae_tiling and max(video.width, video.height) <= TILE:
        raise PlanError(
            f"--vae-tiling does nothing at {video.width}x{video.height}: a tile is {TILE}x{TILE}.",
            hint="--no-vae-tiling",
        )


def check_rollout_vae(machine: Machine) -> None:
    """Raise PlanError where a rollout's VAE, which decodes chunk by chunk, is to work in tiles."""
    if machine.vae_tiling:
        raise PlanError(
            "--vae-tiling does not reach rollouts: their VAE goes on from chunk to chunk, whole.",
            hint="--no-vae-tiling; --vae-dtype bfloat16 takes less memory, too",
        )


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
