"""What the step caches have in common: their report, and leaving no trace."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from wancli.records.record import ForwardStats


class Session:
    """A step cache at work on one transformer, in one generation.

    `forwards` is how many it is set for: caches count them, and one more would be served from
    the wrong branch of the wrong step. `look` reads what the cache did in the forward just made.
    """

    def __init__(
        self,
        transformer: nn.Module,
        forwards: float,
        look: Callable[[], ForwardStats],
        advance: Callable[[], None] = lambda: None,
    ) -> None:
        self.transformer = transformer
        self._left, self._look, self._advance = forwards, look, advance
        self._uses: list[ForwardStats] = []

    def uses(self) -> list[ForwardStats]:
        """What was done so far, in the order of the forwards."""
        return list(self._uses)

    def skip(self) -> None:
        """Count a forward that is not made, because the CFG gate knows what to take for it."""
        self._count()
        self._advance()

    @contextmanager
    def watching(self) -> Iterator["Session"]:
        """Count and look at every forward of the transformer."""
        handles = (
            self.transformer.register_forward_pre_hook(lambda *_: self._count()),
            self.transformer.register_forward_hook(lambda *_: self._uses.append(self._look())),
        )
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _count(self) -> None:
        if not self._left:
            raise RuntimeError("more forwards than the step cache was entered for")
        self._left -= 1


@contextmanager
def as_it_was(*modules: nn.Module) -> Iterator[None]:
    """Leave each module with the attributes and submodules it was found with, error or not.

    Libraries restore outputs and leave things behind: an instance `forward`, flags, registries,
    another order of the submodules, and so of the state dict.
    """
    places = [place for module in modules for place in (vars(module), module._modules)]
    found = [dict(place) for place in places]
    try:
        yield
    finally:
        for place, things in zip(places, found, strict=True):
            place.clear()
            place.update(things)


def is_compiled(module: Any) -> bool:
    """Whether torch.compile has this module as one graph."""
    wrapped = type(module).__name__ == "OptimizedModule"  # torch.compile(module)
    return wrapped or module._compiled_call_impl is not None  # module.compile()
