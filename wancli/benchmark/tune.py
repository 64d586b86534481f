"""Find the largest threshold of a step cache whose worst video frame is still close enough."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from wancli.benchmark.cases import Case, Run, Variant
from wancli.benchmark.measure import Measurer
from wancli.errors import RunError

NOTHING = 1e-9  # a threshold under which nothing is reused
CANDIDATES = 24
SCALE = [float(f"{0.02 * 1.2**i:.3g}") for i in range(CANDIDATES)]  # to 1.3


@dataclass(frozen=True)
class Point:
    """A threshold that was tried: share of the blocks computed, and the least SSIM of a frame."""

    threshold: float
    blocks: float
    ssim: float


@dataclass(frozen=True)
class Tuned:
    """The thresholds that were tried, and the best; None if no reuse is close enough."""

    points: tuple[Point, ...]
    best: Point | None


def tune(
    measurer: Measurer,
    with_threshold: Callable[[float], Variant],
    cases: Sequence[Case],
    *,
    target: float,
) -> Tuned:
    """Bisect for `target`, the least SSIM of any video frame.

    The first run reuses nothing, and must equal one without the cache bit for bit. Candidates are
    the quantiles of the residuals that it saw, or of a cache that tells none, an even scale.
    Raises RunError where it is not equal, or where all is warmup.
    """
    probe = with_threshold(NOTHING)
    residuals = _residuals(measurer, probe, cases)
    told = probe.settings.step_cache.step_cache == "cachedit"
    candidates = _quantiles(residuals) if told else SCALE
    points: list[Point] = []
    low, high = 0, len(candidates)  # the first that is too far is in between
    while low < high:
        middle = (low + high) // 2
        variant = with_threshold(candidates[middle])
        point = _point(candidates[middle], [measurer.made(variant, case).run for case in cases])
        points.append(point)
        low, high = (middle + 1, high) if point.ssim >= target else (low, middle)
    good = [point for point in points if point.ssim >= target and point.blocks < 1]
    best = min(good, key=lambda point: (point.blocks, -point.ssim), default=None)
    return Tuned(tuple(sorted(points, key=lambda point: point.threshold)), best)


def _residuals(measurer: Measurer, variant: Variant, cases: Sequence[Case]) -> list[float]:
    none = variant.settings.step_cache.model_copy(update={"step_cache": "none"})
    plain = variant.settings.model_copy(update={"step_cache": none})
    found: list[float] = []
    for case in cases:
        made = measurer.made(variant, case)
        if case == cases[0]:
            without = measurer.made(replace(variant, settings=plain), case)
            if not torch.equal(made.latents, without.latents):
                raise RunError(
                    f"the step cache changes what {measurer.spec.name} computes even where it "
                    "reuses nothing.",
                    hint="do not use it with this model; please report it",
                )
        found += [use.residual for use in made.run.uses if use.residual is not None]
    if not found and variant.settings.step_cache.step_cache == "cachedit":
        raise RunError(
            "no step could be reused: all of them are warmup.",
            hint="--cachedit-max-warmup-steps 4, or more --steps",
        )
    return found


def _quantiles(residuals: Sequence[float]) -> list[float]:
    """At most `CANDIDATES` thresholds, each just above a residual that was seen, and some more."""
    ordered = sorted(set(residuals))
    count = min(CANDIDATES, len(ordered))
    picked = [ordered[round((i + 1) * len(ordered) / count) - 1] for i in range(count)]
    beyond = [ordered[-1] * 1.5**i for i in range(1, 4)]  # those of reused steps are larger
    return [float(f"{min(1.0, value * 1.001):.4g}") for value in [*picked, *beyond]]


def _point(threshold: float, runs: Sequence[Run]) -> Point:
    uses = [use for run in runs for use in run.uses]
    share = sum(use.blocks for use in uses) / sum(use.blocks_all for use in uses)
    return Point(threshold, share, min(run.quality.ssim.worst for run in runs if run.quality))
