"""diffusers' own step caches (lossy): hooks on the blocks."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers.hooks.first_block_cache import FBCHeadBlockHook, FirstBlockCacheConfig
from diffusers.hooks.mag_cache import MagCacheConfig, MagCacheHeadHook
from diffusers.hooks.sea_cache import SeaCacheConfig, SeaCacheLeaderBlockHook

from wancli.config.settings import StepCache
from wancli.planning.step_caches import StepCacheSpec
from wancli.records.record import ForwardStats

LEADERS = (FBCHeadBlockHook, MagCacheHeadHook, SeaCacheLeaderBlockHook)


@contextmanager
def diffusers_cache(
    transformer: Any,
    settings: StepCache,
    spec: StepCacheSpec,
    *,
    steps: int,
    first_step: int,
    mag_ratios: Sequence[float],
) -> Iterator[Callable[[], ForwardStats]]:
    """Enable the hooks; yields a function that reads the last forward's stats, once each.

    The pipeline's own `cache_context` separates cond and uncond, which decide independently.
    """
    transformer.enable_cache(_config(settings, steps, mag_ratios))
    try:
        yield _stats_reader(_blocks(transformer, spec), settings.step_cache, first_step)
    finally:
        transformer.disable_cache()


def _config(settings: StepCache, steps: int, mag_ratios: Sequence[float]) -> Any:
    """diffusers' defaults, with the threshold of the settings if there is one."""
    threshold = settings.step_cache_threshold
    options = {} if threshold is None else {"threshold": threshold}
    if settings.step_cache == "first-block":
        return FirstBlockCacheConfig(**options)
    if settings.step_cache == "magcache":
        return MagCacheConfig(**options, num_inference_steps=steps, mag_ratios=list(mag_ratios))
    return SeaCacheConfig(**options)


def _blocks(transformer: Any, spec: StepCacheSpec) -> list[Any]:
    """Blocks of all lists, in order."""
    return [block for name in spec.blocks for block in getattr(transformer, name)]


def _stats_reader(
    blocks: Sequence[Any], method: str, first_step: int
) -> Callable[[], ForwardStats]:
    """Reads the first block's hook, which decides for all blocks and keeps a state per branch."""
    hooks = blocks[0]._diffusers_hook.hooks.values()
    states = next(hook.state_manager for hook in hooks if isinstance(hook, LEADERS))
    count = len(blocks)
    always = 1 if method == "first-block" else 0  # blocks that run even in a reused step
    forwards = Counter[str]()  # by branch

    def read_stats() -> ForwardStats:
        branch, state = states.context.name, states.get_state()
        reused = state.consecutive_cached > 0 if method == "seacache" else not state.should_compute
        step = first_step + forwards[branch]
        forwards[branch] += 1
        return ForwardStats(step, branch, always if reused else count, count, reused)

    return read_stats
