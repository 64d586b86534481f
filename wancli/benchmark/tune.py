"""Find the largest threshold of a step cache that keeps every video frame close enough."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from wancli.benchmark.cases import Case, Run, Variant
from wancli.benchmark.measure import Measurer
from wancli.errors import RunError

NO_REUSE = 1e-9  # a threshold below every residual
CANDIDATES = 24
SCALE = [float(f"{0.02 * 1.2**i:.3g}") for i in range(CANDIDATES)]  # up to 1.3


@dataclass(frozen=True)
class TuningPoint:
    """A threshold, the share of blocks it computes, and its minimum SSIM of any frame."""

    threshold: float
    blocks: float
    ssim: float


@dataclass(frozen=True)
class TuningResult:
    """The thresholds tried, and the best; None if none is close enough."""

    points: tuple[TuningPoint, ...]
    best: TuningPoint | None


def tune(
    measurer: Measurer,
    with_threshold: Callable[[float], Variant],
    cases: Sequence[Case],
    *,
    target: float,
) -> TuningResult:
    """Bisect for `target`, the minimum SSIM of any video frame.

    The first run reuses nothing and must equal one without the cache, bit for bit. Candidates are
    quantiles of its residuals, or an even scale for caches without residuals. Raises RunError if
    the runs differ, or if all steps are warmup.
    """
    probe = with_threshold(NO_REUSE)
    residuals = _residuals(measurer, probe, cases)
    has_residuals = probe.settings.step_cache.step_cache == "cachedit"
    candidates = _quantiles(residuals) if has_residuals else SCALE
    points: list[TuningPoint] = []
    low, high = 0, len(candidates)  # the first one that is too high lies between
    while low < high:
        middle = (low + high) // 2
        variant = with_threshold(candidates[middle])
        point = _point(candidates[middle], [measurer.compare(variant, case).run for case in cases])
        points.append(point)
        low, high = (middle + 1, high) if point.ssim >= target else (low, middle)
    good = [point for point in points if point.ssim >= target and point.blocks < 1]
    best = min(good, key=lambda point: (point.blocks, -point.ssim), default=None)
    return TuningResult(tuple(sorted(points, key=lambda point: point.threshold)), best)


def _residuals(measurer: Measurer, variant: Variant, cases: Sequence[Case]) -> list[float]:
    none = variant.settings.step_cache.model_copy(update={"step_cache": "none"})
    plain = variant.settings.model_copy(update={"step_cache": none})
    residuals: list[float] = []
    for case in cases:
        rendered = measurer.compare(variant, case)
        if case == cases[0]:
            uncached = measurer.compare(replace(variant, settings=plain), case)
            if not torch.equal(rendered.latents, uncached.latents):
                raise RunError(
                    f"the step cache changes the latents of {measurer.spec.name} even when it "
                    "reuses nothing.",
                    hint="do not use it with this model; please report it",
                )
        residuals += [use.residual for use in rendered.run.uses if use.residual is not None]
    if not residuals and variant.settings.step_cache.step_cache == "cachedit":
        raise RunError(
            "no step could be reused: all of them are warmup.",
            hint="`cachedit_max_warmup_steps 4`, or more `steps`",
        )
    return residuals


def _quantiles(residuals: Sequence[float]) -> list[float]:
    """At most `CANDIDATES` thresholds, each just above a residual, and a few beyond all of them."""
    ordered = sorted(set(residuals))
    count = min(CANDIDATES, len(ordered))
    picked = [ordered[round((i + 1) * len(ordered) / count) - 1] for i in range(count)]
    beyond = [ordered[-1] * 1.5**i for i in range(1, 4)]  # reused steps have larger ones
    return [float(f"{min(1.0, value * 1.001):.4g}") for value in [*picked, *beyond]]


def _point(threshold: float, runs: Sequence[Run]) -> TuningPoint:
    uses = [use for run in runs for use in run.uses]
    share = sum(use.blocks for use in uses) / sum(use.blocks_all for use in uses)
    return TuningPoint(threshold, share, min(run.quality.ssim.worst for run in runs if run.quality))
