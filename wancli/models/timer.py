"""Time phases on a device without synchronising it."""

from itertools import pairwise
from time import perf_counter
from typing import Any

import torch

from wancli.models.streams import mark_stream


class Timer:
    """Labelled marks in time; an interval has the label of the mark that ends it.

    On CUDA they are marks of the current stream: what the host does meanwhile does not count.
    Reading waits for the last mark, and for nothing behind it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []
        self.mark("start")

    def mark(self, label: str) -> None:
        """End the interval `label`. Does not wait for a CUDA device."""
        if self._device.type == "mps":
            torch.mps.synchronize()
        event = mark_stream(self._device, timing=True)
        self._marks.append((label, perf_counter() if event is None else event))

    def ms(self, label: str) -> list[float]:
        """Milliseconds of each interval that ended in `label`, in order."""
        self._wait()
        return [_ms(a, b) for (_, a), (name, b) in pairwise(self._marks) if name == label]

    def seconds(self, *labels: str) -> float:
        """Seconds of all intervals that ended in one of `labels`."""
        return sum(sum(self.ms(label)) for label in labels) / 1000

    def _wait(self) -> None:
        last = self._marks[-1][1]
        if not isinstance(last, float):
            last.synchronize()


def _ms(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return float(1000 * (end - start))
    return float(start.elapsed_time(end))
