"""Optimizer, learning rate schedule, checkpoints and curves of all trainings."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_WARMUP = 50  # steps


class Optimizer:
    """Muon on the matrices (convolutions as [out, in * kernel]), AdamW on everything else.

    Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/ (torch.optim.Muon).
    """

    def __init__(
        self, matrices: Iterable[Tensor], rest: Iterable[Tensor], *, muon_lr: float, adam_lr: float
    ) -> None:
        self.matrices, self.rest = list(matrices), list(rest)
        self._flat = [nn.Parameter(p.detach().view(len(p), -1)) for p in self.matrices]
        self.peaks = (muon_lr, adam_lr)
        self.muon = torch.optim.Muon(self._flat, lr=muon_lr, weight_decay=0.0)
        self.adam = torch.optim.AdamW(self.rest, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0)

    def step(self, scale: float) -> None:
        """Apply the gradients at `scale` times the peak rates, and clear them."""
        nn.utils.clip_grad_norm_(self.rest, 1.0)
        for flat, p in zip(self._flat, self.matrices, strict=True):
            flat.grad = None if p.grad is None else p.grad.reshape(len(p), -1)
        for optimizer, peak in zip((self.muon, self.adam), self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
            optimizer.step()
        for p in (*self.matrices, *self.rest, *self._flat):
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        """State to resume from."""
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state_dict`."""
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])


def rate(step: int, steps: int, *, hold: float = 0.5) -> float:
    """Fraction of the peak learning rate: short warmup, constant, then linear decay to 2 %."""
    left = (steps - step) / max(1.0, steps * (1 - hold))
    return min(1.0, (step + 1) / _WARMUP, max(0.02, left))


class Log:
    """A training curve: a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def write(self, **values: float) -> None:
        """Append one line."""
        with self.path.open("a") as file:
            file.write(json.dumps({k: round(v, 5) for k, v in values.items()}) + "\n")


def save_checkpoint(path: Path, **state: Any) -> None:
    """Write whole or not at all."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The state that `save_checkpoint` wrote, or None on a first run."""
    return torch.load(path, weights_only=True) if path.exists() else None


def batches(first: int, steps: int) -> Iterator[tuple[int, int]]:
    """Yield (step, seed of its data) from `first` on: resuming gives the same data."""
    for step in range(first, steps):
        yield step, 1_000_003 * (step + 1)
