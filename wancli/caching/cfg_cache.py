"""CFG gate (lossy): from some step on, what guidance adds is taken from a step before."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from wancli.caching.session import Session


@dataclass
class CFGGate:
    """The count of one generation, for all of a pipeline's experts."""

    first: int  # step, from 0, that is the first to do without an uncond forward
    sessions: Sequence[Session]  # step caches to be told; looked at when a forward is skipped
    step: int = -1
    skipped: list[int] = field(default_factory=list)  # steps without an uncond forward

    def skip(self, transformer: nn.Module) -> None:
        """Count an uncond forward of `transformer` that is not made."""
        self.skipped.append(self.step)
        for session in self.sessions:
            if session.transformer is transformer:
                session.skip()


class GatedTransformer(nn.Module):
    """A transformer to a pipeline, that after the gate answers for uncond with cond - delta.

    The pipeline goes on to uncond + scale * (cond - uncond), which is then
    cond + (scale - 1) * delta. delta = cond - uncond is of this transformer's last uncond forward:
    an expert that has made none makes one first. Branches are told by the pipeline's own
    `cache_context`. Everything else is the transformer's.
    """

    def __init__(self, transformer: Any, gate: CFGGate) -> None:
        super().__init__()
        self.transformer, self.gate = transformer, gate
        self.branch = ""
        self.cond: Tensor | None = None
        self.delta: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        """A public attribute of the transformer; torch asks here for what it does not find."""
        if name.startswith("_"):  # what libraries leave there, such as offload hooks, is not ours
            raise AttributeError(name)
        transformer = self._modules["transformer"]
        return transformer if name == "transformer" else getattr(transformer, name)

    @contextmanager
    def cache_context(self, name: str, **where: Any) -> Iterator[None]:
        """Take note of the branch, and let the transformer do so too."""
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
    """Gate the pipeline's transformers for one generation; on exit it has its own again.

    `first` is the first step, from 0, that reuses delta; step caches, entered before or after,
    learn of the forwards that are not made from `sessions`.
    """
    gate = CFGGate(first, sessions)
    found = {name: getattr(pipeline, name, None) for name in ("transformer", "transformer_2")}
    experts = {name: expert for name, expert in found.items() if expert is not None}
    try:
        for name, expert in experts.items():
            setattr(pipeline, name, GatedTransformer(expert, gate))
        yield gate
    finally:
        for name, expert in experts.items():
            setattr(pipeline, name, expert)
