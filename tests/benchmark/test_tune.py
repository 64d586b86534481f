"""The tuner on a measurer with a known answer: SSIM falls and blocks fall as thresholds rise."""

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


class Known:
    """SSIM of the worst frame is 1 - the threshold, and of prompt b another 0.02 less."""

    spec = find_spec("demo")

    def __init__(self, *, exact: bool = True, residuals: tuple[float, ...] = RESIDUALS) -> None:
        self.exact, self.residuals, self.asked = exact, residuals, 0

    def compare(self, variant: Variant, case: Case) -> RenderedRun:
        self.asked += 1
        threshold = variant.settings.step_cache.cachedit_residual_threshold
        worst = 1 - threshold - (0.02 if case.prompt == "b" and threshold > NO_REUSE else 0)
        zero = Measured(0.0, 0.0, 0)
        ssim = Measured((1 + worst) / 2, worst, 3)
        quality = Quality(5, ssim, zero, zero, 0, equal=threshold <= NO_REUSE)
        uses = tuple(
            ForwardStats(i, "cond", 1 if r <= threshold else 8, 8, r <= threshold, r)
            for i, r in enumerate(self.residuals)
        )
        latents = LatentQuality(0.0, 0.0, None, equal=True)
        run = Run("fast", case.prompt, case.seed, "", 1.0, 1.0, 2.0, uses, None, quality, latents)
        off = variant.settings.step_cache.step_cache == "none"
        made = torch.zeros(1) if self.exact or off else torch.ones(1)
        return RenderedRun(run, np.zeros((1, 1, 1, 3), np.uint8), made)


def tuned(known: Known, target: float) -> Any:
    return tune(cast("Measurer", known), variant, CASES, target=target)


def test_the_largest_threshold_whose_worst_frame_is_close_enough_is_found():
    best = tuned(Known(), 0.90).best
    assert best.ssim >= 0.90
    assert 0.06 < best.threshold < 0.08  # 0.08 would be 0.90 exactly, but for the margin
    assert best.blocks < 0.95


def test_every_case_counts_and_the_worst_of_them_decides():
    assert tuned(Known(), 0.90).best.ssim == pytest.approx(
        1 - tuned(Known(), 0.90).best.threshold - 0.02
    )


def test_tuning_bisects():
    known = Known()
    tuned(known, 0.90)
    assert known.asked <= 1 + len(CASES) * (1 + 6)


def test_nothing_is_chosen_where_nothing_is_close_enough():
    assert tuned(Known(), 0.999).best is None


def test_a_model_that_the_cache_changes_even_where_it_reuses_nothing_is_refused():
    with pytest.raises(RunError, match="even when it reuses nothing"):
        tuned(Known(exact=False), 0.90)


def test_warmup_over_all_steps_is_reported():
    known = Known()
    known.residuals = ()
    with pytest.raises(RunError, match="warmup"):
        tuned(known, 0.90)


def test_a_cache_without_residuals_is_tried_on_an_even_scale():
    def seacache(threshold: float) -> Variant:
        cache = StepCache(step_cache="seacache", cachedit_residual_threshold=threshold)
        return replace(variant(threshold), settings=Settings(step_cache=cache))

    best = tune(cast("Measurer", Known()), seacache, CASES, target=0.90).best
    assert best is not None
    assert 0.06 < best.threshold < 0.08


def test_thresholds_include_the_measured_residuals():
    points = tuned(Known(residuals=(0.5, 0.5, 0.25)), 0.6).points
    assert {round(point.threshold, 2) for point in points} <= {0.25, 0.5, 0.75, 1.0}
    assert 0.25 in {round(point.threshold, 2) for point in points}


def test_thresholds_above_all_residuals_are_tried():
    points = tuned(Known(residuals=(0.1, 0.2)), 0.1).points
    assert points[-1].threshold == pytest.approx(0.2 * 1.5**3 * 1.001, rel=1e-3)
