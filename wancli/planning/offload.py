"""What waits in RAM while the device computes with the rest: the ways, the rules, the bytes."""

from wancli.catalog.geometry import TILE
from wancli.catalog.tasks import Task
from wancli.config.settings import Machine, Settings
from wancli.errors import PlanError
from wancli.planning.step_caches import STEP_CACHES

# What is on the device at once, the fastest first.
OFFLOADS = {
    "none": "all parts",
    "model": "one part after the other",
    "group": "one block after the other, and the VAE",
    "sequential": "one layer after the other",
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
