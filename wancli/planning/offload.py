"""Offload modes, VAE tiling, and their rules."""

from wancli.catalog.geometry import TILE
from wancli.catalog.specs import ModelSpec
from wancli.catalog.tasks import Task
from wancli.catalog.tiny_decoder import EXACT
from wancli.config.settings import Machine, Settings
from wancli.errors import PlanError
from wancli.planning.step_caches import STEP_CACHES

# Weights on the device at once, by mode, the fastest first.
OFFLOADS = {
    "none": "all parts",
    "model": "one part after the other",
    "group": "one block after the other, and the VAE",
    "sequential": "one layer after the other",
}


def offloads(settings: Settings, spec: ModelSpec, task: Task) -> tuple[str, ...]:
    """Modes compatible with the other settings. Raises PlanError if the requested one is not."""
    requested, method = settings.machine.offload, settings.step_cache.step_cache
    mode, possible = f"`offload {requested}`", ["none"]
    if settings.prompt_kv.free_kv_weights:
        refused = PlanError(
            f"`free_kv_weights` and {mode} both move the same weights.",
            hint=f"drop `free_kv_weights`: {mode} saves more",
        )
    elif method == "cachedit" and STEP_CACHES[task.transformer].functor:
        refused = PlanError(
            f"`use_cachedit` and {mode} both replace the forward of {task.transformer}.",
            hint="`offload none`, or `step_cache none`",
        )
    elif settings.machine.compile:
        possible = ["none", "model"]
        refused = PlanError(
            f"{mode} moves weights inside the blocks, which `compile` makes one graph each.",
            hint="`offload model`, or `no_compile`",
        )
    elif any(file.packed for file in spec.files):
        possible = ["none", "model", "group"]
        refused = PlanError(
            f"{mode} takes weights apart, which is not possible with those of a GGUF file.",
            hint="`offload group`",
        )
    else:
        return tuple(OFFLOADS)
    if requested not in ("auto", *possible):
        raise refused
    return tuple(possible)


def check_tiling(settings: Settings) -> None:
    """Raise PlanError if the video is no larger than a tile."""
    video = settings.video
    if settings.machine.vae_tiling and max(video.width, video.height) <= TILE:
        raise PlanError(
            f"`vae_tiling` does nothing at {video.width}x{video.height}: a tile is {TILE}x{TILE}.",
            hint="`no_vae_tiling`",
        )


def check_vae_decoder(machine: Machine, task: Task | None = None) -> None:
    """Raise PlanError for a tiny decoder with what only the VAE's own does, or in that task."""
    if machine.vae_decoder == EXACT:
        return
    for name, why in (
        ("vae_tiling", "a tiny decoder needs little memory, and decodes untiled"),
        ("vae_exact", "chooses between two ways of the VAE's own decoder"),
    ):
        value = getattr(machine, name)
        if value:
            raise PlanError(
                f"`{name}` does not work with `vae_decoder {machine.vae_decoder}`: {why}.",
                hint=f"drop `{name}`, or `vae_decoder exact`",
            )
    if task and task.segmented:
        raise PlanError(
            f"`vae_decoder {machine.vae_decoder}` does not work in {task.name}, whose pipeline "
            "decodes its segments itself.",
            hint="`vae_decoder exact`",
        )


def check_rollout_vae(machine: Machine) -> None:
    """Raise PlanError for VAE tiling in a rollout, whose VAE decodes chunk by chunk."""
    check_vae_decoder(machine)
    if machine.vae_tiling:
        raise PlanError(
            "`vae_tiling` does not work in rollouts: their VAE decodes chunk by chunk, untiled.",
            hint="`no_vae_tiling`; `vae_decoder tiny` saves memory, too",
        )
