"""Garbage collection around imports."""

import gc
from contextlib import suppress

import pytest

from wancli.utils.garbage import freeze_again, uncollected


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_in_the_block_and_the_setting_comes_back(enabled):
    states = []
    (gc.enable if enabled else gc.disable)()
    try:
        with suppress(ImportError), uncollected():
            with uncollected():
                states.append(gc.isenabled())
            states.append(gc.isenabled())
            raise ImportError
        assert [*states, gc.isenabled()] == [False, False, enabled]
    finally:
        gc.enable()


def test_only_a_process_that_has_frozen_objects_freezes_more():
    gc.unfreeze()
    try:
        freeze_again()
        assert gc.get_freeze_count() == 0
        gc.freeze()
        before, new = gc.get_freeze_count(), [object()]
        freeze_again()
        assert gc.get_freeze_count() > before
        assert new
    finally:
        gc.freeze()
