"""The attention kernel of a run: the one that is set, or the fastest that is here and right."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from torch.nn.attention import SDPBackend, sdpa_kernel

from wancli.caching.attention import TORCH_KERNELS, is_torch_kernel
from wancli.config.settings import Machine
from wancli.cost.estimate import rates_here
from wancli.cost.kernels import rank_kernels
from wancli.errors import SetupError, first_line

NARROW = (torch.bfloat16, torch.float16)  # in which kernels are measured


@dataclass(frozen=True)
class AttentionKernel:
    """The kernel of a run."""

    name: str = "native"  # that runs, by diffusers' name
    backend: str = "native"  # to attend with
    order: Sequence[SDPBackend] = ()  # of torch's kernels; its own if empty

    @contextmanager
    def preferred(self) -> Iterator[None]:
        """Let torch try its kernels in this order in the block, in all threads.

        None is ruled out, since the VAE's layers have other sizes than the transformer's. A graph
        has the kernel that was first when it was traced: torch keeps it on disk under this name.
        """
        if not self.order:
            yield
            return
        config: Any = torch.compiler.config
        tag = f"{config.cache_key_tag} {self.backend}"
        with sdpa_kernel([*self.order], set_priority=True), config.patch(cache_key_tag=tag):
            yield


DEFAULT_KERNEL = AttentionKernel()


def choose_kernel(
    transformers: Sequence[Any], machine: Machine, device: torch.device, *, tokens: int
) -> AttentionKernel:
    """Set the transformers' attention backend; `auto` chooses one for so many tokens.

    Raises SetupError for a kernel that is missing, or cannot run with this model here.
    """
    names, automatic = [machine.attention_backend], machine.attention_backend == "auto"
    if automatic:
        names = kernels_to_try(transformers[0], machine, device, tokens)
    name = _set_first(transformers, names, device)
    if name == "native":
        return AttentionKernel(_torch_choice(transformers[0], device))
    if not is_torch_kernel(name, device):
        return AttentionKernel(name, name)
    order = [TORCH_KERNELS[name], *(TORCH_KERNELS[n] for n in TORCH_KERNELS if n != name)]
    kernel = AttentionKernel(name, name, order)
    with kernel.preferred():
        ran = _torch_choice(transformers[0], device)
    if ran != name and not automatic:
        raise SetupError(
            f"`attention_backend {name}` does not run with this model and `dtype` here.",
            hint=f"`attention_backend {ran}`",
        )
    return replace(kernel, name=ran)


def kernels_to_try(
    transformer: Any, machine: Machine, device: torch.device, tokens: int
) -> list[str]:
    """Backends to try, the best first; the last is always there."""
    if backend := os.environ.get("DIFFUSERS_ATTN_BACKEND"):
        return [backend]
    config = transformer.config
    if device.type != "cuda" or not hasattr(config, "ffn_dim"):  # HunyuanVideo's needs a mask
        return ["native"]
    rates = rates_here(machine) if transformer.dtype in NARROW else None
    heads = config.num_attention_heads
    ranked = rank_kernels(rates.kernels, heads=heads, tokens=tokens) if rates else {}
    return [*ranked, next(iter(TORCH_KERNELS))]


def _set_first(transformers: Sequence[Any], names: Sequence[str], device: torch.device) -> str:
    """Set the first backend that is still there: a kernel may be gone since it was measured."""
    *others, last = names
    for name in others:
        with suppress(SetupError):
            set_backend(transformers, name, device)
            return name
    set_backend(transformers, last, device)
    return last


def set_backend(transformers: Iterable[Any], name: str, device: torch.device) -> None:
    """Let the transformers attend with a backend of diffusers, or of torch.

    Of these instances only: diffusers' own method sets it for the whole process. Raises SetupError
    if it is unknown or missing.
    """
    backend = "native" if is_torch_kernel(name, device) else name
    try:
        with attention_backend(backend):  # checks its package, and loads its kernel
            pass
    except (ValueError, RuntimeError, ImportError) as error:
        raise SetupError(
            f"`attention_backend {name}`: {first_line(error)}",
            hint="`attention_backend native`",
        ) from None
    for transformer in transformers:
        for processor in transformer.attn_processors.values():
            if hasattr(processor, "_attention_backend"):
                processor._attention_backend = AttentionBackendName(backend)


def _torch_choice(transformer: Any, device: torch.device) -> str:
    """The kernel that torch chooses now for this model's attention, by diffusers' name."""
    config = transformer.config
    shape = (1, config.num_attention_heads, 128, config.attention_head_dim)
    query = torch.empty(shape, dtype=transformer.dtype, device=device)
    choice = SDPBackend(torch._fused_sdp_choice(query, query, query))
    names = {kernel: name for name, kernel in TORCH_KERNELS.items()}
    return names.get(choice, "native")
