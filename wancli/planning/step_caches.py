"""Facts and rules of the step caches (lossy), without torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from wancli.catalog.tasks import Task
from wancli.config.settings import Settings, StepCache
from wancli.errors import PlanError
from wancli.utils.packages import check_package

CACHE_DIT = (1, 5, 3)  # first version that keeps two transformers of one process apart
WITH_THRESHOLD = ("first-block", "magcache", "seacache")  # diffusers', with step_cache_threshold
LEAST_STEPS = 9  # fewer leave no step between warmup and end


@dataclass(frozen=True)
class StepCacheSpec:
    """How step caches apply to a transformer class and its subclasses."""

    transformer: str
    blocks: tuple[str, ...] = ("blocks",)
    patterns: tuple[str, ...] = ("Pattern_2",)  # cache-dit's word for a block's inputs and outputs
    functor: str = ""  # cache-dit's patch for a forward that does more than call the blocks
    most_bn: int | None = None
    hooks: tuple[str, ...] = ()  # diffusers' step caches that are correct for it
    refused: str = ""  # why no step cache is correct for it

    @property
    def changes_text(self) -> bool:
        """Whether its blocks update the text tokens, too."""
        return "Pattern_0" in self.patterns


STEP_CACHES = {
    spec.transformer: spec
    for spec in (
        StepCacheSpec("WanTransformer3DModel", hooks=WITH_THRESHOLD),
        # Its forward adds a hint after some blocks. The functor moves that into the blocks, where
        # cache-dit sees it; diffusers' hooks would add each hint twice.
        StepCacheSpec("WanVACETransformer3DModel", functor="WanVACEPatchFunctor", most_bn=1),
        StepCacheSpec(
            "HunyuanVideoTransformer3DModel",
            blocks=("transformer_blocks", "single_transformer_blocks"),
            patterns=("Pattern_0", "Pattern_0"),
            hooks=("first-block",),
        ),
        StepCacheSpec(
            "WanAnimateTransformer3DModel",
            refused="its forward runs a face adapter between the blocks, which a step cache skips",
        ),
    )
}

# Ratio of the blocks' residual norm between consecutive steps (MagCache, arXiv:2506.09045), for the
# cond branch in 50 steps. From MagCache4Wan2.1 and MagCache4Wan2.2 of
# https://github.com/Zehong-Ma/MagCache (df81cb1). Not Wan 2.2 A14B: its ratios continue across the
# switch of experts, and a hook counts the steps of one.
MAG_RATIOS = {
    "wan2.1-t2v-1.3b": (
        1.0, 1.0124, 1.00166, 0.99791, 0.99682, 0.99634, 0.99567, 0.99416, 0.99578, 0.9957,
        0.99511, 0.99535, 0.99552, 0.99541, 0.9954, 0.99489, 0.99518, 0.99484, 0.99481, 0.99415,
        0.99419, 0.99396, 0.99388, 0.99349, 0.99309, 0.9927, 0.99228, 0.99171, 0.99137, 0.99068,
        0.99005, 0.98944, 0.98849, 0.98758, 0.98644, 0.98504, 0.9836, 0.98202, 0.97977, 0.97717,
        0.9741, 0.97003, 0.96538, 0.9593, 0.95086, 0.94013, 0.92402, 0.90241, 0.86821, 0.81838,
    ),
    "wan2.1-t2v-14b": (
        1.0, 1.02504, 1.00025, 0.9985, 0.99779, 0.9966, 0.99482, 0.99467, 0.99664, 0.99434,
        0.99533, 0.99468, 0.99438, 0.99516, 0.99384, 0.99404, 0.99517, 0.99409, 0.99428, 0.99347,
        0.99418, 0.99271, 0.99313, 0.99215, 0.99218, 0.99216, 0.99163, 0.99138, 0.98982, 0.98996,
        0.9887, 0.98772, 0.98767, 0.98573, 0.98501, 0.9838, 0.98177, 0.98037, 0.97678, 0.97546,
        0.97184, 0.96711, 0.96349, 0.95629, 0.94926, 0.93964, 0.92511, 0.90693, 0.8796, 0.86111,
    ),
    "wan2.2-ti2v-5b": (
        1.0, 0.99505, 0.99441, 0.99558, 0.99499, 0.99534, 0.99468, 0.99463, 0.9946, 0.99408,
        0.9945, 0.99409, 0.99403, 0.99382, 0.99349, 0.99377, 0.9933, 0.99303, 0.99217, 0.992,
        0.99201, 0.99133, 0.99112, 0.99155, 0.98958, 0.98959, 0.98838, 0.98826, 0.9883, 0.98711,
        0.98562, 0.98511, 0.98414, 0.98284, 0.98104, 0.97981, 0.97849, 0.97557, 0.97398, 0.97171,
        0.96917, 0.96511, 0.96263, 0.95839, 0.95483, 0.94942, 0.9468, 0.94583, 0.94843, 0.96949,
    ),
}  # fmt: skip


def step_cache_spec(classes: Iterable[str]) -> StepCacheSpec:
    """The spec of a transformer, by its class names in method resolution order.

    Raises PlanError if no step cache supports it.
    """
    names = list(classes)
    spec = next((STEP_CACHES[name] for name in names if name in STEP_CACHES), None)
    reason = spec.refused if spec else f"known are {', '.join(STEP_CACHES)}"
    if spec is None or reason:
        raise PlanError(f"{names[0]} has no step cache: {reason}.", hint="`step_cache none`")
    return spec


def check_step_cache(settings: StepCache, *, steps: int, model: str = "", layers: int = 0) -> None:
    """Raise PlanError for a step cache that cannot work, or would silently do nothing.

    `steps` are those of the whole generation; `layers` are the transformer's blocks, or those of
    its shortest list of blocks (0: unknown).
    """
    method = settings.step_cache
    if method == "none":
        return
    if steps < LEAST_STEPS:
        raise PlanError(
            f"a step cache has nothing to reuse in {steps} steps; it needs {LEAST_STEPS}.",
            hint="`steps 20`, or drop the step cache",
        )
    if method == "cachedit":
        _check_cachedit(settings, steps)
        if layers:
            check_blocks(settings, layers)
        check_cache_dit()
    elif method == "magcache" and model not in MAG_RATIOS:
        raise PlanError(
            f"`step_cache` magcache needs a model's ratios; {model or 'this model'} has none.",
            hint=f"`use_cachedit`, or `model` {' or '.join(MAG_RATIOS)}",
        )


def check_step_cache_task(settings: StepCache, task: Task) -> None:
    """Raise PlanError for a step cache that the task's transformer or pipeline does not support."""
    method = settings.step_cache
    if method == "none":
        return
    spec = step_cache_spec([task.transformer])
    if method == "cachedit":
        _check_last_blocks(settings.cachedit_bn, spec)
        return
    if method not in spec.hooks:
        raise PlanError(
            f"`step_cache {method}` gives wrong results on {spec.transformer}.",
            hint="`use_cachedit`",
        )
    if not task.tells_branches or (method != "first-block" and not task.tells_steps):
        raise PlanError(
            f"`step_cache {method}` does not work with {task.name}: its pipeline does not report "
            f"the {'step' if task.tells_branches else 'branch'}.",
            hint="`use_cachedit`",
        )


def _check_last_blocks(bn: int, spec: StepCacheSpec) -> None:
    if spec.most_bn is not None and bn > spec.most_bn:
        raise PlanError(
            f"`cachedit_bn {bn}`: this model adds control hints to some blocks, so the last "
            f"{bn} would get those of others.",
            hint=f"`cachedit_bn {spec.most_bn}`",
        )


def _check_cachedit(settings: StepCache, steps: int) -> None:
    warmup, order = settings.cachedit_max_warmup_steps, settings.taylorseer_order
    if warmup >= steps:
        raise PlanError(
            f"`cachedit_max_warmup_steps {warmup}` leaves none of {steps} steps to reuse.",
            hint=f"`cachedit_max_warmup_steps {min(4, steps - 1)}`",
        )
    if settings.taylorseer and warmup < taylorseer_steps(order):
        raise PlanError(
            f"`taylorseer_order {order}` needs {taylorseer_steps(order)} computed steps; "
            f"after {warmup} it would extrapolate at a lower order.",
            hint=f"`cachedit_max_warmup_steps {taylorseer_steps(order)}`",
        )


def check_blocks(settings: StepCache, blocks: int) -> None:
    """Raise PlanError if Fn and Bn leave none of `blocks` to reuse."""
    fn, bn = settings.cachedit_fn, settings.cachedit_bn
    if fn + bn >= blocks:
        raise PlanError(
            f"`cachedit_fn {fn}` and `cachedit_bn {bn}` leave none of {blocks} blocks to reuse.",
            hint=f"`cachedit_fn {max(1, blocks // 4)}` `cachedit_bn 0`",
        )


def gate_step(settings: Settings, task: Task, *, steps: int, segments: int = 1) -> int | None:
    """The first of `steps` that skips the uncond branch. Raises PlanError."""
    gate, setting = settings.step_cache.cfg_gate, task.family.guidance
    if gate is None:
        return None
    if not task.tells_branches:
        raise PlanError(
            f"`cfg_gate` does not work with {task.name}: its pipeline does not report the branch.",
            hint="drop `cfg_gate`",
        )
    if segments > 1:
        raise PlanError(
            f"`cfg_gate` does not work with {segments} segments: it reuses guidance within one.",
            hint="drop `cfg_gate`",
        )
    scale: float = getattr(settings.sampling, setting)
    if scale <= 1:
        raise PlanError(
            f"`cfg_gate` needs guidance; `{setting}` is {scale:g}.", hint="drop `cfg_gate`"
        )
    step = ceil(gate * steps) if gate < 1 else gate
    if step != int(step) or gate == 1:  # 1: all of it, or the first step?
        raise PlanError(
            f"`cfg_gate {gate:g}` is neither a step from 2 on nor a fraction.", hint="12, or 0.6"
        )
    if step >= steps:
        raise PlanError(
            f"`cfg_gate {gate:g}` is never reached in {steps} steps.",
            hint="`cfg_gate 0.5`" if steps > 1 else "drop `cfg_gate`",
        )
    return int(step)


def check_cache_dit() -> None:
    """Raise SetupError if cache-dit is missing or too old, without importing it."""
    check_package("cache-dit", CACHE_DIT, needed_by="`use_cachedit`")


def taylorseer_steps(order: int) -> int:
    """Computed steps that cache-dit 1.5.3 needs before it extrapolates at full `order`."""
    return order + 3


def step_cache_bytes(
    *, tokens: int, dim: int, branches: int, bytes_per_element: int, taylorseer_order: int | None,
    text: int = 0,
) -> int:  # fmt: skip
    """Bytes of a full cache-dit cache per list of blocks, for [tokens, dim] hidden states.

    Without TaylorSeer: the residuals of the first Fn blocks (the change measure) and of the others.
    With it: for the others, values and derivatives of the last two computed steps. If the blocks
    update `text` tokens, the same for those, except the measure.
    """
    tensors = 2 if taylorseer_order is None else 3 + 2 * taylorseer_order
    rows = tensors * tokens + (tensors - 1) * text
    return branches * rows * dim * bytes_per_element
