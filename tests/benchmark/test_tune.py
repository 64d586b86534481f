"""The tuner on a fake measurer: SSIM and computed blocks decrease as thresholds increase."""

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch

from wancli.benchmark.cases import Case, Run, Variant
from wancli.benchmark.measure import Measurer, RenderedRun
from wancli.benchmark.tune import NO_REUSE, tune
from wancli.catalog.local import find_spec
from wancli.config.settings import Settings, StepCache
from wancli.errors import RunError
from wancli.planning.plan import make_plan
from wancli.records.record import ForwardStats
from wancli.video.compare import LatentQuality, Measured, Quality

CASES = [Case("a", 0), Case("b", 1)]
RESIDUALS = tuple(0.01 * (i + 1) for i in range(40))


def variant(threshold: float) -> Variant:
    cache = StepCache(step_cache="cachedit", cachedit_residual_threshold=threshold)
    settings = Settings(step_cache=cache)
    return Variant("fast", "", settings, make_plan(Settings(), find_spec("demo")), lossy=True)


class FakeMeasurer:
    """Its worst SSIM is 1 - threshold, and another 0.02 less for prompt b."""

    spec = find_spec("demo")

    def __init__(self, *, exact: bool = True, residuals: tuple[float, ...] = RESIDUALS) -> None:
        self.exact, self.residuals, self.measured = exact, residuals, 0

    def compare(self, variant: Variant, case: Case) -> RenderedRun:
        self.measured += 1
        threshold = variant.settings.step_cache.cachedit_residual_threshold
        worst = 1 - threshold - (0.02 if case.prompt == "b" and threshold > NO_REUSE else 0)
        zero = Measured(0.0, 0.0, 0)
        ssim = Measured((1 + worst) / 2, worst, 3)
        quality = Quality(5, ssim, zero, zero, 0, equal=threshold <= NO_REUSE)
        uses = tuple(
            ForwardStats(i, "cond", 1 if r <= threshold else 8, 8, r <= threshold, r)
            for i, r in enumerate(self.residuals)
        )
        same = LatentQuality(0.0, 0.0, None, equal=True)
        run = Run("fast", case.prompt, case.seed, "", 1.0, 1.0, 2.0, uses, None, quality, same)
        uncached = variant.settings.step_cache.step_cache == "none"
        latents = torch.zeros(1) if self.exact or uncached else torch.ones(1)
        return RenderedRun(run, np.zeros((1, 1, 1, 3), np.uint8), latents)


def run_tuner(measurer: FakeMeasurer, target: float) -> Any:
    return tune(cast("Measurer", measurer), variant, CASES, target=target)


def test_the_largest_threshold_that_meets_the_target_is_found():
    best = run_tuner(FakeMeasurer(), 0.90).best
    assert best.ssim >= 0.90
    assert 0.06 < best.threshold < 0.08  # 0.08 would reach exactly 0.90, without a margin
    assert best.blocks < 0.95


def test_the_worst_case_decides():
    assert run_tuner(FakeMeasurer(), 0.90).best.ssim == pytest.approx(
        1 - run_tuner(FakeMeasurer(), 0.90).best.threshold - 0.02
    )


def test_tuning_bisects():
    measurer = FakeMeasurer()
    run_tuner(measurer, 0.90)
    assert measurer.measured <= 1 + len(CASES) * (1 + 6)


def test_nothing_is_chosen_if_nothing_meets_the_target():
    assert run_tuner(FakeMeasurer(), 0.999).best is None


def test_a_cache_that_changes_latents_without_reuse_is_rejected():
    with pytest.raises(RunError, match="even when it reuses nothing"):
        run_tuner(FakeMeasurer(exact=False), 0.90)


def test_warmup_over_all_steps_is_reported():
    measurer = FakeMeasurer()
    measurer.residuals = ()
    with pytest.raises(RunError, match="warmup"):
        run_tuner(measurer, 0.90)


def test_a_cache_without_residuals_is_tuned_on_an_even_scale():
    def seacache(threshold: float) -> Variant:
        cache = StepCache(step_cache="seacache", cachedit_residual_threshold=threshold)
        return replace(variant(threshold), settings=Settings(step_cache=cache))

    best = tune(cast("Measurer", FakeMeasurer()), seacache, CASES, target=0.90).best
    assert best is not None
    assert 0.06 < best.threshold < 0.08


def test_thresholds_include_the_measured_residuals():
    points = run_tuner(FakeMeasurer(residuals=(0.5, 0.5, 0.25)), 0.6).points
    assert {round(point.threshold, 2) for point in points} <= {0.25, 0.5, 0.75, 1.0}
    assert 0.25 in {round(point.threshold, 2) for point in points}


def test_thresholds_above_all_residuals_are_tried():
    points = run_tuner(FakeMeasurer(residuals=(0.1, 0.2)), 0.1).points
    assert points[-1].threshold == pytest.approx(0.2 * 1.5**3 * 1.001, rel=1e-3)
