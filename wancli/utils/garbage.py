"""Imports without garbage collection, which would take a quarter of their time and find nothing."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage in the block: for imports and loading, where nearly everything stays."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def freeze_again() -> None:
    """Leave everything made so far out of garbage collection, where the process has begun to.

    The command line does, see lazy.py; in a program of others, this does nothing. Models must not
    be loaded yet: they are released by garbage collection.
    """
    if gc.get_freeze_count():
        gc.freeze()
