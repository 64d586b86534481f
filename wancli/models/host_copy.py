"""Copy tensors from a device to the host without making the caller wait."""

from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """Copies of tensors of one device on the host, which its current stream fills in time.

    On CUDA the copies are pinned: torch keeps the memory and uses it again once they are freed, so
    that two or three buffers serve a whole rollout if `wait` is followed by a copy out of them.
    Elsewhere they are there at once.
    """

    def __init__(self, *tensors: Tensor) -> None:
        cuda = any(tensor.is_cuda for tensor in tensors)
        self._copies = [tensor.to("cpu", non_blocking=cuda) for tensor in tensors]
        self._done: Any = None
        if cuda:
            self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._done.record()

    def wait(self) -> list[Tensor]:
        """The copies, once they are whole. Holds no lock of Python's meanwhile."""
        if self._done is not None:
            self._done.synchronize()
        return self._copies
