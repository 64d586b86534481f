"""Step caches (lossy): skip blocks that change little from one denoising step to the next."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from math import inf
from typing import Any

from torch import nn

from wancli.caching.diffusers_hooks import diffusers_cache
from wancli.caching.session import Session, restored
from wancli.config.settings import StepCache
from wancli.errors import PlanError
from wancli.planning.step_caches import (
    StepCacheSpec,
    check_blocks,
    check_cache_dit,
    step_cache_spec,
)
from wancli.records.record import ForwardStats


@contextmanager
def step_cache(
    transformer: Any,
    settings: StepCache,
    *,
    steps: int,
    guided: bool,
    first_step: int = 0,
    mag_ratios: Sequence[float] = (),
) -> Iterator[Session]:
    """Let the transformer reuse blocks as the settings allow; restored on exit, error or not.

    Enter it for one generation, so that no state carries over. The transformer runs `steps` steps,
    from `first_step` of the generation on; each of two experts has its own. Without a step cache
    the session stays empty. Raises PlanError.
    """
    if settings.step_cache == "none":
        yield Session(transformer, inf, _no_stats)
        return
    if _is_compiled(transformer):
        raise PlanError(
            "a transformer compiled as a whole has no blocks left for a step cache.",
            hint="transformer.compile_repeated_blocks(fullgraph=True), or `step_cache none`",
        )
    spec = step_cache_spec(kind.__name__ for kind in type(transformer).__mro__)
    lists = [getattr(transformer, name) for name in spec.blocks]
    forwards = steps * (2 if guided else 1)
    with ExitStack() as stack:
        stack.enter_context(restored(transformer, *lists, *(b for blocks in lists for b in blocks)))
        if settings.step_cache == "cachedit":
            stack.enter_context(_dbcache(transformer, settings, spec, steps=steps, guided=guided))
            session = _session(transformer, settings, lists, forwards, first_step)
        else:
            read_stats = stack.enter_context(
                diffusers_cache(
                    transformer, settings, spec, steps=steps, first_step=first_step,
                    mag_ratios=mag_ratios,
                )
            )  # fmt: skip
            session = Session(transformer, forwards, read_stats)
        yield stack.enter_context(session.watching())


def _is_compiled(module: Any) -> bool:
    """Whether the module is compiled as a whole."""
    wrapped = type(module).__name__ == "OptimizedModule"  # torch.compile(module)
    return wrapped or module._compiled_call_impl is not None  # module.compile()


def _no_stats() -> ForwardStats:
    raise RuntimeError("there is no step cache to read")


def _session(
    transformer: Any,
    settings: StepCache,
    lists: Sequence[Any],
    forwards: int,
    first_step: int,
) -> Session:
    """A session on cache-dit's contexts, which all count the same forwards."""
    contexts = _contexts(transformer)

    def read_stats() -> ForwardStats:
        step, uncond = contexts[0].get_current_step(), contexts[0].is_separate_cfg_step()
        reused = [
            step in (context.cfg_cached_steps if uncond else context.cached_steps)
            for context in contexts
        ]
        residuals = contexts[0].cfg_residual_diffs if uncond else contexts[0].residual_diffs
        residual = residuals.get(str(step), -1.0)  # below 0 is cache-dit's "not measured"
        always = settings.cachedit_fn + settings.cachedit_bn
        return ForwardStats(
            step=first_step + step,
            branch="uncond" if uncond else "cond",
            blocks=sum(
                always if hit else len(blocks) for hit, blocks in zip(reused, lists, strict=True)
            ),
            blocks_all=sum(len(blocks) for blocks in lists),
            reused=any(reused),
            residual=residual if residual >= 0 else None,
        )

    def advance() -> None:
        for context in contexts:
            context.mark_step_begin()

    return Session(
        transformer, forwards, read_stats, advance=advance, release=partial(_free, contexts)
    )


def _contexts(transformer: Any) -> list[Any]:
    """cache-dit's contexts of the transformer: one per list of blocks."""
    manager = transformer._context_manager
    return [manager.get_context(name) for name in transformer._context_names]


def _free(contexts: Sequence[Any]) -> None:
    """Free all tensors of cache-dit's contexts, whose own method leaves those of TaylorSeer."""
    for context in contexts:
        context.clear_buffers()
        for calibrator in (*context.get_calibrators(), *context.get_cfg_calibrators()):
            if calibrator is not None:
                calibrator.reset_cache()


@contextmanager
def _dbcache(
    transformer: Any, settings: StepCache, spec: StepCacheSpec, *, steps: int, guided: bool
) -> Iterator[None]:
    """Enable cache-dit; `restored` undoes what it does to the modules."""
    _check_attachable(transformer, spec, settings)
    with _cache_dit() as library:
        library.enable_cache(
            _adapter(library, transformer, spec, guided=guided),
            cache_config=_config(library, settings, steps=steps, guided=guided),
            calibrator_config=_calibrator(library, settings, spec),
        )
        try:
            yield
        finally:
            _free(_contexts(transformer))


@contextmanager
def _cache_dit() -> Iterator[Any]:
    """The library, with its log kept off stdout and down to errors in the block."""
    check_cache_dit()
    import cache_dit

    with ExitStack() as undo:
        for handler in logging.getLogger("CACHE_DIT").handlers:  # shared by its modules
            undo.callback(handler.setLevel, handler.level)
            handler.setLevel(logging.ERROR)
            if type(handler) is logging.StreamHandler:
                # Not by setStream, which flushes the other stream: that may be closed.
                undo.callback(setattr, handler, "stream", handler.stream)
                handler.stream = logging.StreamHandler().stream
        yield cache_dit


def _adapter(library: Any, transformer: Any, spec: StepCacheSpec, *, guided: bool) -> Any:
    """Attach cache-dit to the transformer; given a pipeline it would patch the pipeline's class.

    It sets a flag on the class of its stand-in for a pipeline: hence a fresh class each time.
    """
    from cache_dit.caching import patch_functors
    from cache_dit.caching.block_adapters import FakeDiffusionPipeline

    return library.BlockAdapter(
        pipe=type("NoPipeline", (FakeDiffusionPipeline,), {})(),
        transformer=transformer,
        blocks=[getattr(transformer, name) for name in spec.blocks],
        blocks_name=list(spec.blocks),
        forward_pattern=[library.ForwardPattern[name] for name in spec.patterns],
        patch_functor=getattr(patch_functors, spec.functor)() if spec.functor else None,
        has_separate_cfg=guided,
        check_forward_pattern=True,
    )


def _config(library: Any, settings: StepCache, *, steps: int, guided: bool) -> Any:
    """Cond and uncond are decided together: otherwise they would mix different steps."""
    return library.DBCacheConfig(
        Fn_compute_blocks=settings.cachedit_fn,
        Bn_compute_blocks=settings.cachedit_bn,
        residual_diff_threshold=settings.cachedit_residual_threshold,
        max_warmup_steps=settings.cachedit_max_warmup_steps,
        max_continuous_cached_steps=settings.cachedit_max_continuous or -1,
        num_inference_steps=steps,
        enable_separate_cfg=guided,
        cfg_diff_compute_separate=False,
    )


def _calibrator(library: Any, settings: StepCache, spec: StepCacheSpec) -> Any:
    """TaylorSeer (arXiv:2503.06923), of lower order until `taylorseer_steps` steps are computed.

    Also extrapolates the text where the blocks change it.
    """
    if not settings.taylorseer:
        return None
    return library.TaylorSeerCalibratorConfig(
        taylorseer_order=settings.taylorseer_order,
        enable_encoder_calibrator=spec.changes_text,
    )


def _check_attachable(transformer: Any, spec: StepCacheSpec, settings: StepCache) -> None:
    """Raise PlanError where cache-dit would go wrong, RuntimeError inside another step cache."""
    if "_is_cached" in vars(transformer):
        raise RuntimeError("enter one step cache at a time")  # cache-dit would keep the first
    for name in spec.blocks:
        blocks = getattr(transformer, name)
        check_blocks(settings, len(blocks))
        _check_groups(blocks, settings.cachedit_bn)
    if any(hook.config.stream for hook in map(_group_hook, transformer.modules()) if hook):
        raise PlanError(
            "group offload with streams fetches blocks that a step cache skips.",
            hint="group offload without use_stream, or `step_cache none`",
        )
    if spec.functor and any("forward" in vars(m) for m in (transformer, *transformer.blocks)):
        raise PlanError(
            f"{spec.transformer} cannot be offloaded under a step cache: both replace its forward.",
            hint="`step_cache none`",
        )


def _check_groups(blocks: Any, bn: int) -> None:
    """The first block of an offload group loads the rest: the last `bn` must begin a group."""
    hook = _group_hook(blocks[0])
    group = len(hook.group.modules) if hook else 1
    if bn and (len(blocks) - bn) % group:
        raise PlanError(
            f"`cachedit_bn {bn}` begins inside a group of {group} blocks that are offloaded "
            "together.",
            hint=f"`cachedit_bn 0`, or one group: {len(blocks) % group or group}",
        )


def _group_hook(module: nn.Module) -> Any:
    registry = getattr(module, "_diffusers_hook", None)
    return registry.get_hook("group_offloading") if registry else None
