"""Time phases on a device without synchronising at each mark."""

from itertools import pairwise
from time import perf_counter
from typing import Any

import torch


class Timer:
    """Labelled marks in time; an interval has the label of the mark that ends it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []
        self.mark("start")

    def mark(self, label: str) -> None:
        """End the interval `label`. Does not wait for a CUDA device."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append((label, event))
            return
        if self._device.type == "mps":
            torch.mps.synchronize()
        self._marks.append((label, perf_counter()))

    def ms(self, label: str) -> list[float]:
        """Milliseconds of each interval that ended in `label`, in order."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return [
                a.elapsed_time(b) for (_, a), (name, b) in pairwise(self._marks) if name == label
            ]
        return [1000 * (b - a) for (_, a), (name, b) in pairwise(self._marks) if name == label]

    def seconds(self, *labels: str) -> float:
        """Seconds of all intervals that ended in one of `labels`."""
        return sum(sum(self.ms(label)) for label in labels) / 1000
