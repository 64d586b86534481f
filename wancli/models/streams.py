"""Streams and copies that let a CUDA device work without making the host wait."""

from collections.abc import Iterator
from contextlib import contextmanager
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


class SideStream:
    """A stream beside a CUDA device's current one; on other devices, and without, just the order.

    Work of one stream does not wait for that of another, nor does its memory: both are said here.
    """

    def __init__(self, device: torch.device, *, beside: bool) -> None:
        cuda = beside and device.type == "cuda"
        self._stream: Any = None
        if cuda:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextmanager
    def after(self, ready: Any, *tensors: Tensor) -> Iterator[None]:
        """Queue the work of the block behind the mark `ready` of another stream.

        `tensors` of that stream keep their memory until this one has read them.
        """
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            for tensor in tensors:
                tensor.record_stream(self._stream)
            yield


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
