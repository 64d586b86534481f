"""What attention in Wan's blocks shares: projections, and kernels of torch or of other libraries.

Shapes: B batch, L tokens of the queries, M tokens of keys and values, H heads, D head size.
"""

from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

# torch's kernels by diffusers' names, in the order in which they are tried on a GPU that was not
# measured. torch's own order begins with the second.
TORCH_KERNELS = {
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "_native_math": SDPBackend.MATH,
}


def is_torch_kernel(backend: str, device: torch.device) -> bool:
    """Whether torch runs this backend by itself; on a CPU it cannot be told which to take."""
    return backend == "native" or (backend in TORCH_KERNELS and device.type == "cuda")


def attend(
    query: Tensor, key: Tensor, value: Tensor, backend: str = "native", *,
    mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Queries [B, L, H, D] attend to keys and values [B, M, H, D]: [B, L, H, D].

    `backend` is a name of diffusers' `AttentionBackendName`, whose requirements are met and whose
    kernel is loaded. torch chooses among its own kernels, on a GPU in the order that is set. Of
    another library's torch.compile sees one operator, so that none breaks a graph. Most of those
    take no mask: with `mask` [B or 1, 1, 1, M], True where a key is visible, torch attends.
    """
    if mask is not None or is_torch_kernel(backend, query.device):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    mixed: Tensor = torch.ops.wancli.attend(query, key, value, backend)
    return mixed


@torch.library.custom_op("wancli::attend", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, backend: str) -> Tensor:
    name = AttentionBackendName(backend)
    mixed: Tensor = dispatch_attention_fn(query, key, value, backend=name)
    return mixed.contiguous()  # as the fake promises


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, backend: str) -> Tensor:
    return query.new_empty(query.shape)


def by_head(attn: Any, x: Tensor) -> Tensor:
    """[B, L, H*D] to [B, L, H, D]."""
    return x.view(*x.shape[:2], attn.heads, -1)


def project(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised queries and keys, and values, of tokens [B, L, H*D]: each [B, L, H, D]."""
    if attn.fused_projections:
        query, key, value = attn.to_qkv(x).chunk(3, dim=-1)
    else:
        query, key, value = attn.to_q(x), attn.to_k(x), attn.to_v(x)
    query, key = attn.norm_q(query), attn.norm_k(key)
    return by_head(attn, query), by_head(attn, key), by_head(attn, value)


def project_out(attn: Any, mixed: Tensor) -> Tensor:
    """The block's output [B, L, H*D] of [B, L, H*D]."""
    out: Tensor = attn.to_out[1](attn.to_out[0](mixed))
    return out
