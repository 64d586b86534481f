"""Rules about step caches."""

import pytest

from wancli.catalog.tasks import HUNYUAN_TEXT, IMAGE, TASKS, VACE
from wancli.config.settings import StepCache
from wancli.errors import PlanError, SetupError
from wancli.planning.step_caches import (
    MAG_RATIOS,
    WITH_THRESHOLD,
    check_cache_dit,
    check_step_cache,
    check_step_cache_task,
    step_cache_bytes,
    step_cache_spec,
)

INSTALLED = "wancli.utils.packages.package_version"  # of a package


def dbcache(**changes):
    values = {"step_cache": "cachedit", "cachedit_fn": 2, "cachedit_max_warmup_steps": 3}
    return StepCache(**(values | changes))


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        (dbcache(cachedit_max_warmup_steps=20), "`cachedit_max_warmup_steps 4`"),
        (dbcache(taylorseer=True), "`cachedit_max_warmup_steps 4`"),
        (
            dbcache(taylorseer=True, taylorseer_order=2, cachedit_max_warmup_steps=4),
            "`cachedit_max_warmup_steps 5`",
        ),
        (dbcache(cachedit_fn=8), "`cachedit_fn 2` `cachedit_bn 0`"),
        (dbcache(cachedit_bn=6), "`cachedit_fn 2` `cachedit_bn 0`"),
        (StepCache(step_cache="magcache"), "`use_cachedit`, or `model` wan2.1-t2v-1.3b"),
    ],
)
def test_step_caches_that_leave_nothing_to_reuse_are_rejected(settings, hint):
    with pytest.raises(PlanError) as caught:
        check_step_cache(settings, steps=20, layers=8, model="demo")
    assert caught.value.hint.startswith(hint)


@pytest.mark.parametrize(
    ("task", "settings", "hint"),
    [
        *((VACE, StepCache(step_cache=m), "`use_cachedit`") for m in WITH_THRESHOLD),
        *((HUNYUAN_TEXT, StepCache(step_cache=m), "`use_cachedit`") for m in WITH_THRESHOLD[1:]),
        (IMAGE, StepCache(step_cache="seacache"), "`use_cachedit`"),
        (VACE, dbcache(cachedit_bn=2), "`cachedit_bn 1`"),
    ],
)
def test_a_step_cache_that_is_wrong_for_a_transformer_is_rejected(task, settings, hint):
    with pytest.raises(PlanError) as caught:
        check_step_cache_task(settings, TASKS[task])
    assert caught.value.hint == hint


@pytest.mark.parametrize("method", ["cachedit", "first-block", "magcache", "seacache"])
def test_fewer_than_nine_steps_are_rejected(method):
    settings = dbcache(step_cache=method)
    check_step_cache(settings, steps=9, layers=8, model="wan2.1-t2v-14b")
    with pytest.raises(PlanError, match="8 steps"):
        check_step_cache(settings, steps=8, layers=8, model="wan2.1-t2v-14b")


@pytest.mark.parametrize(
    "settings",
    [
        StepCache(),
        dbcache(cachedit_fn=5, cachedit_bn=2),
        dbcache(taylorseer=True, cachedit_max_warmup_steps=4),
        StepCache(step_cache="first-block", step_cache_threshold=0.1),
    ],
)
def test_compatible_settings_are_accepted(settings):
    check_step_cache(settings, steps=20, layers=8)
    check_step_cache(settings, steps=20)


def test_a_missing_or_old_cache_dit_says_what_to_install(monkeypatch):
    check_cache_dit()
    for installed in ("1.5.2", "1.4", "0.9.10"):
        monkeypatch.setattr(INSTALLED, lambda _, installed=installed: installed)
        with pytest.raises(SetupError, match=f"not {installed}") as caught:
            check_step_cache(dbcache(), steps=20)
        assert caught.value.hint == "pip install 'cache-dit>=1.5.3'"
    for installed in ("1.5.3", "1.10.0", "2.0.0rc1"):
        monkeypatch.setattr(INSTALLED, lambda _, installed=installed: installed)
        check_cache_dit()

    monkeypatch.setattr(INSTALLED, lambda _: "")
    with pytest.raises(SetupError) as caught:
        check_cache_dit()
    assert caught.value.hint == "pip install 'cache-dit>=1.5.3'"


def test_animate_is_rejected_with_the_reason():
    with pytest.raises(PlanError, match="face adapter"):
        step_cache_spec(["WanAnimateTransformer3DModel", "ModelMixin"])


def test_a_subclass_inherits_the_step_caches_of_its_nearest_base():
    names = ["Special", "WanVACETransformer3DModel", "WanTransformer3DModel", "ModelMixin"]
    assert step_cache_spec(names).transformer == "WanVACETransformer3DModel"
    with pytest.raises(PlanError, match="Other has no step cache: known are Wan"):
        step_cache_spec(["Other", "Module"])


def test_14b_at_720p_with_taylorseer_and_guidance_takes_7_7_gb():
    nbytes = step_cache_bytes(
        tokens=75_600, dim=5120, branches=2, bytes_per_element=2, taylorseer_order=1
    )
    assert nbytes == pytest.approx(7.7e9, rel=0.01)


def test_published_magcache_ratios_cover_50_steps():
    for ratios in MAG_RATIOS.values():
        assert len(ratios) == 50
        assert ratios[0] == 1.0
        assert all(0.79 < ratio < 1.03 for ratio in ratios)
