"""Offload a pipeline's weights to RAM, and bring them to the device when they are used."""

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

CPU = torch.device("cpu")


def place(
    pipeline: Any, device: torch.device, offload: str, *, stays: Collection[str] = ()
) -> None:
    """Move the pipeline to the device, or offload its weights to RAM.

    `offload` is `none`, `model`, `group` or `sequential`. `stays` are components that model offload
    leaves on the device.
    """
    if offload in ("auto", "none"):  # auto is resolved by the capacity check, before loading
        pipeline.to(device)
    elif offload == "model":
        _by_part(pipeline, device, stays)
    elif offload == "group":
        _by_block(pipeline, device)
    else:
        _by_layer(pipeline, device)


def onload(part: Any) -> None:
    """Bring a component to its device if it is offloaded, for calls of its layers alone."""
    if hook := getattr(part, "_hf_hook", None):
        hook.pre_forward(part)


def parts_of(pipeline: Any) -> dict[str, nn.Module]:
    """The components with weights, by name."""
    parts = pipeline.components.items()
    return {name: part for name, part in parts if isinstance(part, nn.Module)}


class OffloadManager:
    """Keeps one of a pipeline's components on the device at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._onloaded: nn.Module | None = None

    def onload(self, part: nn.Module) -> None:
        """Move a component to the device, and the previous one back to RAM.

        One that does not fit is in RAM again after the error.
        """
        if part is self._onloaded:
            return
        before, self._onloaded = self._onloaded, None
        if before is not None:
            before.to(CPU)
            clear_device_cache()
        try:
            part.to(self.device)
        except BaseException:  # with some of its weights there
            part.to(CPU)
            raise
        self._onloaded = part


class OffloadHook(ModelHook):  # type: ignore[misc]
    """Brings a component to the device when it is called.

    In diffusers' model offload a component offloads only its predecessor in a fixed order: two
    alternating experts, or a VAE that encodes first, would both be resident. It also replaces its
    hooks at the end of every video, which breaks the caches.
    """

    def __init__(self, manager: OffloadManager) -> None:
        self.manager = manager
        self.execution_device = manager.device  # read by diffusers

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Move the module and its arguments to the device."""
        self.manager.onload(module)
        device = self.execution_device
        return send_to_device(args, device), send_to_device(kwargs, device)


class ResidentHook(ModelHook):  # type: ignore[misc]
    """Tells diffusers the execution device of a component that stays on it."""

    def __init__(self, device: torch.device) -> None:
        self.execution_device = device


def _by_part(pipeline: Any, device: torch.device, stays: Collection[str]) -> None:
    manager = OffloadManager(device)
    for name, part in parts_of(pipeline).items():
        if name in stays:
            part.to(device)
        add_hook_to_module(part, ResidentHook(device) if name in stays else OffloadHook(manager))


def _by_block(pipeline: Any, device: torch.device) -> None:
    """Offload transformers by block and encoders by layer; the VAE stays.

    Groups of one block, so that a step cache can start at any. No streams: they would prefetch the
    next block before a step cache decides to skip it.
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
