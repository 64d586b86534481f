"""Warnings about our code are errors under pytest; those of libraries are not."""

import warnings

import pytest


@pytest.mark.parametrize("module", ["tests.test_warnings", "wancli.video.read", "wancli"])
def test_a_warning_about_our_code_is_an_error(module):
    with pytest.raises(UserWarning):
        warnings.warn_explicit("about us", UserWarning, "x.py", 1, module=module)


@pytest.mark.parametrize("module", ["torch.profiler.profiler", "wancli_like_library"])
def test_a_warning_inside_a_library_is_not_an_error(module):
    with warnings.catch_warnings(record=True) as seen:
        warnings.warn_explicit("about itself", UserWarning, "x.py", 1, module=module)
    assert len(seen) == 1
