"""Copies and marks that let a CUDA device work without making the host wait."""

from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """Copies of tensors of one device on the host, which its current stream fills in time.

    On CUDA they pass through pinned memory, which torch keeps: since `wait` empties it, two or
    three buffers serve a whole rollout. Elsewhere the copies are there at once.
    """

    def __init__(self, *tensors: Tensor) -> None:
        device = tensors[0].device
        self._pinned = device.type == "cuda"
        self._copies = [tensor.to("cpu", non_blocking=self._pinned) for tensor in tensors]
        self.ready = mark_stream(device)

    def wait(self) -> list[Tensor]:
        """The copies, once they are whole; other threads run meanwhile. Call it once."""
        if self._pinned:
            self.ready.synchronize()
            self._copies = [copy.clone() for copy in self._copies]  # in memory that is not pinned
        return self._copies


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, behind what a CUDA device's current stream has to do.

    Only memory that is pinned is copied without waiting until the stream has come so far.
    """
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def mark_stream(device: torch.device, *, timing: bool = False) -> Any:
    """An event at the end of what a CUDA device's current stream has to do; None elsewhere."""
    if device.type != "cuda":
        return None
    # Blocking: a thread that waits for it sleeps, and leaves its core to the encoder.
    event = torch.cuda.Event(enable_timing=timing, blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
