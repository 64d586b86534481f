"""CFG gate (lossy): from some step on, the guidance delta of an earlier step is reused."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from wancli.caching.session import Session


@dataclass
class CFGGate:
    """Step counter of one generation, shared by all of a pipeline's experts."""

    first: int  # first step, from 0, without an uncond forward
    sessions: Sequence[Session]  # step caches to notify; read when a forward is skipped
    step: int = -1
    skipped: list[int] = field(default_factory=list)  # steps without an uncond forward

    def skip(self, transformer: nn.Module) -> None:
        """Record a skipped uncond forward of `transformer`."""
        self.skipped.append(self.step)
        for session in self.sessions:
            if session.transformer is transformer:
                session.skip()


class GatedTransformer(nn.Module):
    """Stands in for a pipeline's transformer and returns cond - delta for uncond after the gate.

    The pipeline's uncond + scale * (cond - uncond) then equals cond + (scale - 1) * delta. delta =
    cond - uncond of this transformer's last uncond forward: an expert without one runs one first.
    The pipeline's own `cache_context` names the branches. All else is passed on to the transformer.
    """

    def __init__(self, transformer: Any, gate: CFGGate) -> None:
        super().__init__()
        self.transformer, self.gate = transformer, gate
        self.branch = ""
        self.cond: Tensor | None = None
        self.delta: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        """A public attribute of the transformer, if torch finds none on this module."""
        if name.startswith("_"):  # marks that libraries leave on it, such as offload hooks
            raise AttributeError(name)
        transformer = self._modules["transformer"]
        return transformer if name == "transformer" else getattr(transformer, name)

    @contextmanager
    def cache_context(self, name: str, **where: Any) -> Iterator[None]:
        """Note the branch, here and in the transformer."""
        self.branch = name
        with self.transformer.cache_context(name, **where):
            yield

    def forward(self, **inputs: Any) -> tuple[Tensor]:
        """The velocity [B, C, F, H, W] in a tuple, as with `return_dict=False`."""
        if self.branch == "cond":
            self.gate.step += 1
            (self.cond,) = self.transformer(**inputs)
            return (self.cond,)
        if self.cond is None:
            raise RuntimeError("an uncond forward comes after the cond forward of its step")
        if self.delta is not None and self.gate.step >= self.gate.first:
            self.gate.skip(self.transformer)
            return (self.cond - self.delta,)
        (uncond,) = self.transformer(**inputs)
        self.delta = self.cond - uncond
        return (uncond,)


@contextmanager
def cfg_gate(pipeline: Any, first: int, sessions: Sequence[Session] = ()) -> Iterator[CFGGate]:
    """Gate the pipeline's transformers for one generation; restored on exit.

    `first` is the first step, from 0, that reuses delta. The `sessions` of step caches, which may
    be entered before or after, are notified of skipped forwards.
    """
    gate = CFGGate(first, sessions)
    names = ("transformer", "transformer_2")
    experts = {
        name: expert for name in names if (expert := getattr(pipeline, name, None)) is not None
    }
    try:
        for name, expert in experts.items():
            setattr(pipeline, name, GatedTransformer(expert, gate))
        yield gate
    finally:
        for name, expert in experts.items():
            setattr(pipeline, name, expert)
