"""Facts and rules of the step caches (lossy), for the plan: without torch."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from wancli.catalog.tasks import Task
from wancli.config.resolve import flag
from wancli.config.settings import Settings, StepCache
from wancli.errors import PlanError
from wancli.utils.packages import check_package

CACHE_DIT = (1, 5, 3)  # the first whose two transformers of one process do not mix
LEAST_STEPS = 9  # with fewer there is nothing between the warmup and the end


@dataclass(frozen=True)
class StepCacheSpec:
    """What a step cache must know of a transformer class, its subclasses included."""

    transformer: str
    blocks: tuple[str, ...] = ("blocks",)
    patterns: tuple[str, ...] = ("Pattern_2",)  # cache-dit's word for a block's inputs and outputs
    functor: str = ""  # cache-dit's replacement of forwards that do more than call the blocks
    most_bn: int | None = None
    hooks: tuple[str, ...] = ()  # diffusers' own step caches that are right on it
    refused: str = ""  # why no step cache is

    @property
    def changes_text(self) -> bool:
        """Whether its blocks change the text, too."""
        return "Pattern_0" in self.patterns


STEP_CACHES = {
    spec.transformer: spec
    for spec in (
        StepCacheSpec("WanTransformer3DModel", hooks=("first-block", "magcache", "seacache")),
        # Its forward adds a hint after some blocks. The functor moves that into the blocks, where
        # cache-dit sees it; diffusers' hooks do not, and add each hint twice.
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

# How much larger the blocks' residual is in a step than in the one before (MagCache,
# arXiv:2506.09045), of the cond branch in 50 steps. From MagCache4Wan2.1 and MagCache4Wan2.2 of
# https://github.com/Zehong-Ma/MagCache (df81cb1). Not Wan 2.2 A14B: its ratios run on across the
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
    """The spec of a transformer by the names of its classes, its own first.

    Raises PlanError for one that has none, or that no step cache is right on.
    """
    names = list(classes)
    spec = next((STEP_CACHES[name] for name in names if name in STEP_CACHES), None)
    reason = spec.refused if spec else f"known are {', '.join(STEP_CACHES)}"
    if spec is None or reason:
        raise PlanError(f"{names[0]} has no step cache: {reason}.", hint="--step-cache none")
    return spec


def check_step_cache(settings: StepCache, *, steps: int, model: str = "", layers: int = 0) -> None:
    """Raise PlanError for what cannot go together, or would silently do nothing.

    `steps` are those of the whole generation, `layers` the blocks of the transformer, or of the
    shorter of its lists; 0 is unknown.
    """
    method = settings.step_cache
    if method == "none":
        return
    if steps < LEAST_STEPS:
        raise PlanError(
            f"a step cache has nothing to reuse in {steps} steps; it takes {LEAST_STEPS} or more.",
            hint="--steps 20, or drop the step cache",
        )
    if method == "cachedit":
        _check_cachedit(settings, steps)
        if layers:
            check_blocks(settings, layers)
        check_cache_dit()
    elif method == "magcache" and model not in MAG_RATIOS:
        raise PlanError(
            f"--step-cache magcache needs a model's ratios; {model or 'this model'} has none.",
            hint=f"--use-cachedit, or --model {' or '.join(MAG_RATIOS)}",
        )


def check_step_cache_task(settings: StepCache, task: Task) -> None:
    """Raise PlanError for a step cache that the task's transformer or pipeline has no place for."""
    method = settings.step_cache
    if method == "none":
        return
    spec = step_cache_spec([task.transformer])
    if method == "cachedit":
        if spec.most_bn is not None and settings.cachedit_bn > spec.most_bn:
            raise _too_many(settings.cachedit_bn, spec.most_bn)
        return
    if method not in spec.hooks:
        raise PlanError(
            f"--step-cache {method} would go wrong on {spec.transformer}.", hint="--use-cachedit"
        )
    if not task.tells_branches or (method != "first-block" and not task.tells_steps):
        raise PlanError(
            f"--step-cache {method} does not go with {task.name}: its pipeline does not say which "
            f"{'step' if task.tells_branches else 'branch'} it is at.",
            hint="--use-cachedit",
        )


def _too_many(bn: int, most: int) -> PlanError:
    return PlanError(
        f"--cachedit-bn {bn}: this model adds a hint to some blocks, and would give the last {bn} "
        "the hints of others.",
        hint=f"--cachedit-bn {most}",
    )


def _check_cachedit(settings: StepCache, steps: int) -> None:
    warmup, order = settings.cachedit_max_warmup_steps, settings.taylorseer_order
    if warmup >= steps:
        raise PlanError(
            f"--cachedit-max-warmup-steps {warmup} leaves none of {steps} steps to reuse.",
            hint=f"--cachedit-max-warmup-steps {min(4, steps - 1)}",
        )
    if settings.taylorseer and warmup < taylorseer_steps(order):
        raise PlanError(
            f"--taylorseer-order {order} needs {taylorseer_steps(order)} computed steps; "
            f"after {warmup} it would extrapolate at a lower order.",
            hint=f"--cachedit-max-warmup-steps {taylorseer_steps(order)}",
        )


def check_blocks(settings: StepCache, blocks: int, *, most_bn: int | None = None) -> None:
    """Raise PlanError where Fn and Bn leave no block of `blocks` to reuse, or Bn is too many."""
    fn, bn = settings.cachedit_fn, settings.cachedit_bn
    if fn + bn >= blocks:
        raise PlanError(
            f"--cachedit-fn {fn} and --cachedit-bn {bn} leave none of {blocks} blocks to reuse.",
            hint=f"--cachedit-fn {max(1, blocks // 4)} --cachedit-bn 0",
        )
    if most_bn is not None and bn > most_bn:
        raise _too_many(bn, most_bn)


def gate_step(settings: Settings, task: Task, *, steps: int, segments: int = 1) -> int | None:
    """The first of `steps` of which the uncond branch is not computed. Raises PlanError."""
    gate, setting = settings.step_cache.cfg_gate, task.family.guidance
    if gate is None:
        return None
    if not task.tells_branches:
        raise PlanError(
            f"--cfg-gate does not go with {task.name}: its pipeline does not say which branch it "
            "is at.",
            hint="drop --cfg-gate",
        )
    if segments > 1:
        raise PlanError(
            f"--cfg-gate does not go with {segments} segments: what it reuses is of one.",
            hint="drop --cfg-gate",
        )
    scale: float = getattr(settings.sampling, setting)
    if scale <= 1:
        raise PlanError(
            f"--cfg-gate needs guidance; {flag(setting)} is {scale:g}.", hint="drop --cfg-gate"
        )
    step = ceil(gate * steps) if gate < 1 else gate
    if step != int(step) or gate == 1:  # 1: all of it, or the first step?
        raise PlanError(
            f"--cfg-gate {gate:g} is neither a step from 2 on nor a fraction.", hint="12, or 0.6"
        )
    if step >= steps:
        raise PlanError(
            f"--cfg-gate {gate:g} is never reached in {steps} steps.",
            hint=f"--cfg-gate {max(1, round(0.6 * steps))}, or 0.6",
        )
    return int(step)


def check_cache_dit() -> None:
    """Raise SetupError where cache-dit is missing or too old, without importing it."""
    check_package("cache-dit", CACHE_DIT, asked="--use-cachedit")


def taylorseer_steps(order: int) -> int:
    """Computed steps after which cache-dit 1.5.3 extrapolates at `order`; before, it is lower."""
    return order + 3


def step_cache_bytes(
    *, tokens: int, dim: int, branches: int, bytes_per_element: int, taylorseer_order: int | None,
    text: int = 0,
) -> int:  # fmt: skip
    """What cache-dit holds of [tokens, dim] for each list of blocks, once it is full.

    And of `text` tokens, where the blocks change them: all of it but the measure.

    The residuals of the first and of the other blocks; for TaylorSeer, of the others the values
    and their derivatives, of the last computed step and of the one before.
    """
    tensors = 2 if taylorseer_order is None else 3 + 2 * taylorseer_order
    rows = tensors * tokens + (tensors - 1) * text
    return branches * rows * dim * bytes_per_element
