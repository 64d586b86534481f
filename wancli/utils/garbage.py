"""Imports without garbage collection, and errors that keep nothing alive."""

import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage in the block: for imports and loading, where nearly everything stays.

    It would take a quarter of the time of imports.
    """
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


def release_locals(error: BaseException) -> None:
    """Let go of what the functions that an error went through had in their variables.

    An error and those before it, its causes and contexts, keep tensors and models alive that way.
    """
    errors, released = [error], []
    while errors:
        each = errors.pop()
        released.append(each)
        traceback.clear_frames(each.__traceback__)
        behind = (each.__cause__, each.__context__)
        errors += [earlier for earlier in behind if earlier and earlier not in released]
