"""Diffusers' own classes at any size on the meta device, and the memory that a run allocates."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    WanAnimateTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from wancli.catalog.hf_configs import autoencoder_config, transformer_config
from wancli.catalog.wan import Autoencoder, Transformer


def transformer(t: Transformer, *, dtype: torch.dtype = torch.float32) -> Any:
    """A model of that shape without weights; layers that diffusers keeps in float32 stay so."""
    kind: Any = WanTransformer3DModel
    if t.vace_blocks:
        kind = WanVACETransformer3DModel
    if t.face:
        kind = WanAnimateTransformer3DModel
    with torch.device("meta"):
        model = kind(**transformer_config(t)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        wide = any(part in kind._keep_in_fp32_modules for part in name.split("."))
        parameter.data = parameter.data.to(torch.float32 if wide else dtype)
    return model


def inputs(t: Transformer, *, frames: int = 3, height: int = 4, width: int = 6) -> dict[str, Any]:
    """Inputs of one forward for latents of that size and 512 text tokens."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, device="meta")

    tensors = {
        "hidden_states": empty(1, t.in_channels, frames, height, width),
        "timestep": empty(1),
        "encoder_hidden_states": empty(1, 512, t.text_dim),
    }
    if t.vace_blocks:
        tensors["control_hidden_states"] = empty(1, t.vace_channels, frames, height, width)
    if t.image_dim:
        images = 2 if t.image_positions else 1
        tensors["encoder_hidden_states_image"] = empty(images, 257, t.image_dim)
    if t.face:
        size = t.face.size
        tensors["pose_hidden_states"] = empty(1, t.out_channels, frames - 1, height, width)
        tensors["face_pixel_values"] = empty(1, 3, 4 * (frames - 1) - 3, size, size)
    return tensors


def vae(shape: Autoencoder) -> AutoencoderKLWan:
    """The VAE of that shape, without weights."""
    with torch.device("meta"):
        return AutoencoderKLWan(**autoencoder_config(shape)).eval()


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def flops(call: Callable[[], object]) -> int:
    counter = FlopCounterMode(display=False)
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        counter,
    ):  # the CPU's own kernel is not counted
        call()
    return counter.get_total_flops()


def peak_bytes(
    model: nn.Module, call: Callable[[], object], *, fused: Sequence[Callable[..., object]] = ()
) -> int:
    """Peak bytes of the tensors alive while `call` runs, without the model's own."""
    ledger = _Ledger(model)
    with torch.no_grad(), _Fused(*fused), ledger:
        call()
    return ledger.peak


def moved(call: Callable[[], object]) -> int:
    """Bytes that `call` reads and writes, except in matmuls, attention, convolutions and views."""
    meter = _Meter()
    with torch.no_grad(), _Fused(), meter:
        call()
    return meter.bytes


class _Meter(TorchDispatchMode):
    """Adds up the inputs and outputs of every operation."""

    heavy = ("mm", "bmm", "addmm", "convolution")

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        name = str(func).split(".")[1]
        operands, results = (
            [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
            for tree in ((args, kwargs), out)
        )
        own = {x.untyped_storage()._cdata for x in operands}
        view = any(x.untyped_storage()._cdata in own for x in results) and not name.endswith("_")
        if not view and name not in self.heavy:
            self.bytes += sum(x.numel() * x.element_size() for x in [*operands, *results])
        return out


class _Ledger(TorchDispatchMode):
    """Counts every storage from the operation that creates it until its last reference is gone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        own = [*model.parameters(), *model.buffers()]
        self._live = {tensor.untyped_storage()._cdata: 0 for tensor in own}
        self._now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._live:
                    self._live[storage._cdata] = storage.nbytes()
                    self._now += storage.nbytes()
                    weakref.finalize(storage, self._free, storage._cdata)
        self.peak = max(self.peak, self._now)
        return out

    def _free(self, key: int) -> None:
        self._now -= self._live.pop(key, 0)


class _Fused(TorchFunctionMode):
    """Attention as a fused kernel: the meta device only has the one that materializes scores.

    So are `others` whose output is like their input.
    """

    def __init__(self, *others: Callable[..., object]) -> None:
        super().__init__()
        self._others = others

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func is nn.functional.scaled_dot_product_attention:
            return torch.empty_like(args[0] if args else (kwargs or {})["query"])
        if func in self._others:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))
