"""Shared by the step caches: their report, and restoring modules."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from wancli.records.record import ForwardStats


class Session:
    """A step cache on one transformer during one generation.

    Caches count forwards: one more than the announced `forwards` would be served from the wrong
    branch and step, so it is an error. `read_stats` tells what the cache did in the last forward,
    `advance` lets the cache count a forward that is skipped. `release` frees what the cache keeps,
    after the last of them: of two experts, the second needs that memory.
    """

    def __init__(
        self,
        transformer: nn.Module,
        forwards: float,
        read_stats: Callable[[], ForwardStats],
        *,
        advance: Callable[[], None] = lambda: None,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self.transformer = transformer
        self._left, self._read_stats = forwards, read_stats
        self._advance, self._release = advance, release
        self._stats: list[ForwardStats] = []

    def stats(self) -> list[ForwardStats]:
        """Stats of the forwards so far, in order."""
        return list(self._stats)

    def skip(self) -> None:
        """Count a forward that the CFG gate skips."""
        self._begin()
        self._advance()
        self._end()

    @contextmanager
    def watching(self) -> Iterator["Session"]:
        """Count and record every forward of the transformer."""
        handles = (
            self.transformer.register_forward_pre_hook(lambda *_: self._begin()),
            self.transformer.register_forward_hook(lambda *_: self._record()),
        )
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self) -> None:
        if not self._left:
            raise RuntimeError("more forwards than the step cache was entered for")
        self._left -= 1

    def _record(self) -> None:
        self._stats.append(self._read_stats())
        self._end()

    def _end(self) -> None:
        if not self._left:
            self._release()


@contextmanager
def restored(*modules: nn.Module) -> Iterator[None]:
    """Restore the attributes and submodules of each module on exit, even after an error.

    Libraries leave things behind: an instance `forward`, flags, registries, another order of the
    submodules and so of the state dict.
    """
    dicts = [entries for module in modules for entries in (vars(module), module._modules)]
    copies = [dict(entries) for entries in dicts]
    try:
        yield
    finally:
        for entries, copy in zip(dicts, copies, strict=True):
            entries.clear()
            entries.update(copy)
