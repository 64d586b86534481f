"""Where a pipeline's weights wait, and when they come to the device that computes."""

from collections.abc import Collection
from typing import Any

import torch
from accelerate import cpu_offload  # type: ignore[import-untyped]
from accelerate.hooks import ModelHook, add_hook_to_module  # type: ignore[import-untyped]
from accelerate.utils import send_to_device  # type: ignore[import-untyped]
from accelerate.utils.memory import clear_device_cache  # type: ignore[import-untyped]
from diffusers.hooks import apply_group_offloading
from torch import nn

from wancli.catalog.tasks import EXPERTS
from wancli.errors import PlanError

CPU = torch.device("cpu")


def place(
    pipeline: Any, device: torch.device, offload: str, *, stays: Collection[str] = ()
) -> None:
    """Put the pipeline on the device; offloaded, its weights wait in RAM until they are needed.

    `stays` are parts that model offload leaves on the device. Raises PlanError where that is RAM.
    """
    if offload in ("auto", "none"):  # auto is decided by what fits, before anything loads
        pipeline.to(device)
        return
    if device.type in ("cpu", "mps"):
        raise PlanError(
            f"--offload {offload} needs a CUDA GPU, and torch finds none here.",
            hint="--offload none",
        )
    offload_to(pipeline, device, offload, stays=stays)


def offload_to(
    pipeline: Any, device: torch.device, offload: str, *, stays: Collection[str] = ()
) -> None:
    """The same, on whatever device."""
    if offload == "model":
        _by_part(pipeline, device, stays)
    elif offload == "group":
        _by_block(pipeline, device)
    else:
        _by_layer(pipeline, device)


def parts_of(pipeline: Any) -> dict[str, nn.Module]:
    """Those that have weights."""
    found = pipeline.components.items()
    return {name: part for name, part in found if isinstance(part, nn.Module)}


class OffloadManager:
    """Which of a pipeline's parts is on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._there: nn.Module | None = None

    def give(self, part: nn.Module) -> None:
        """Let it be that one; the one before goes back to RAM."""
        if part is self._there:
            return
        if self._there is not None:
            self._there.to(CPU)
            clear_device_cache()
        part.to(self.device)
        self._there = part


class OffloadHook(ModelHook):  # type: ignore[misc]
    """Gives a part its turn when it is called.

    diffusers' own model offload lets a part send away only the one that stands before it in a fixed
    order: of two experts in turns, or a VAE that encodes first, both would be there. It also puts
    its hooks on anew at the end of every video, from under the caches.
    """

    def __init__(self, turns: OffloadManager) -> None:
        self.turns, self.execution_device = turns, turns.device  # which diffusers looks for

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Bring the module and what it is given."""
        self.turns.give(module)
        device = self.execution_device
        return send_to_device(args, device), send_to_device(kwargs, device)


class ResidentHook(ModelHook):  # type: ignore[misc]
    """Says where a part that has no turns is: diffusers asks any of them for all."""

    def __init__(self, device: torch.device) -> None:
        self.execution_device = device


def _by_part(pipeline: Any, device: torch.device, stays: Collection[str]) -> None:
    turns = OffloadManager(device)
    for name, part in parts_of(pipeline).items():
        if name in stays:
            part.to(device)
        add_hook_to_module(part, ResidentHook(device) if name in stays else OffloadHook(turns))


def _by_block(pipeline: Any, device: torch.device) -> None:
    """Transformers block by block, encoders of prompts and pictures by layer; the VAE stays.

    One block makes a group, so that a step cache may begin with any. No streams: they fetch the
    next block before anyone knows that it is left out.
    """
    for name, part in parts_of(pipeline).items():
        if name == "vae":
            part.to(device)
        elif name in EXPERTS.values():
            apply_group_offloading(
                part, onload_device=device, offload_type="block_level", num_blocks_per_group=1
            )
        else:
            apply_group_offloading(part, onload_device=device, offload_type="leaf_level")


def _by_layer(pipeline: Any, device: torch.device) -> None:
    for part in parts_of(pipeline).values():
        own = any(True for _ in part.parameters(recurse=False))
        cpu_offload(part, device, offload_buffers=own)  # as diffusers' sequential offload does
