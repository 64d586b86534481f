"""diffusers' own step caches (lossy), which are hooks on the blocks."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers.hooks.first_block_cache import FBCHeadBlockHook, FirstBlockCacheConfig
from diffusers.hooks.mag_cache import MagCacheConfig, MagCacheHeadHook
from diffusers.hooks.sea_cache import SeaCacheConfig, SeaCacheLeaderBlockHook

from wancli.caching.session import is_compiled
from wancli.config.settings import StepCache
from wancli.errors import PlanError
from wancli.planning.step_caches import StepCacheSpec, check_hook
from wancli.records.record import ForwardStats

LEADERS = (FBCHeadBlockHook, MagCacheHeadHook, SeaCacheLeaderBlockHook)


@contextmanager
def hooked(
    transformer: Any,
    settings: StepCache,
    spec: StepCacheSpec,
    *,
    steps: int,
    first_step: int,
    mag_ratios: Sequence[float],
) -> Iterator[Callable[[], ForwardStats]]:
    """Put the hooks on; yields what reads, once, what they did in the last forward.

    The hooks keep cond and uncond apart by the pipeline's own `cache_context`, and each branch
    decides for itself.
    """
    _check_hookable(transformer, settings, spec)
    transformer.enable_cache(_config(settings, steps, mag_ratios))
    try:
        yield _look(_blocks(transformer, spec), settings.step_cache, first_step)
    finally:
        transformer.disable_cache()


def _config(settings: StepCache, steps: int, mag_ratios: Sequence[float]) -> Any:
    """diffusers' defaults, but for the threshold where one is given."""
    threshold = settings.step_cache_threshold
    given = {} if threshold is None else {"threshold": threshold}
    if settings.step_cache == "first-block":
        return FirstBlockCacheConfig(**given)
    if settings.step_cache == "magcache":
        return MagCacheConfig(**given, num_inference_steps=steps, mag_ratios=list(mag_ratios))
    return SeaCacheConfig(**given)


def _blocks(transformer: Any, spec: StepCacheSpec) -> list[Any]:
    """Of all lists, in their order."""
    return [block for name in spec.blocks for block in getattr(transformer, name)]


def _look(blocks: Sequence[Any], method: str, first_step: int) -> Callable[[], ForwardStats]:
    """The first block's hook decides for all, and keeps its state by branch."""
    hooks = blocks[0]._diffusers_hook.hooks.values()
    states = next(hook.state_manager for hook in hooks if isinstance(hook, LEADERS))
    count = len(blocks)
    least = 1 if method == "first-block" else 0  # the first block is its measure
    made = Counter[str]()

    def look() -> ForwardStats:
        branch, state = states.context.name, states.get_state()
        reused = state.consecutive_cached > 0 if method == "seacache" else not state.should_compute
        step = first_step + made[branch]
        made[branch] += 1
        return ForwardStats(step, branch, least if reused else count, count, reused)

    return look


def _check_hookable(transformer: Any, settings: StepCache, spec: StepCacheSpec) -> None:
    method, config = settings.step_cache, transformer.config
    check_hook(method, spec)
    if method == "seacache" and config.in_channels != config.out_channels:
        raise PlanError(
            "--step-cache seacache reads the noisy latents, and knows them in text-to-video only.",
            hint="--use-cachedit",
        )
    if any(is_compiled(block) for block in _blocks(transformer, spec)):
        raise PlanError(
            f"--step-cache {method} hooks into blocks, which must not be compiled.",
            hint="--use-cachedit",
        )
