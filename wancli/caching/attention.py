"""Attention by torch's kernels, or by another library's behind one operator.

Shapes: B batch, L tokens of the queries, M tokens of keys and values, H heads, D head size.
"""

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attend(
    query: Tensor, key: Tensor, value: Tensor, backend: str = "native", *,
    mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Queries [B, L, H, D] attend to keys and values [B, M, H, D]: [B, L, H, D].

    `backend` is a name of diffusers' `AttentionBackendName`, whose requirements are met and whose
    kernel is loaded; `mask` [B or 1, 1, 1, M] is True where a key is visible. With any other
    backend than native, torch.compile sees one operator, so that no kernel breaks a graph.
    """
    if backend == "native":
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    mixed: Tensor = torch.ops.wancli.attend(query, key, value, backend, mask)
    return mixed


@torch.library.custom_op("wancli::attend", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, backend: str, mask: Tensor | None) -> Tensor:
    name = AttentionBackendName(backend)
    mixed: Tensor = dispatch_attention_fn(query, key, value, attn_mask=mask, backend=name)
    return mixed.contiguous()  # as the fake promises


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, backend: str, mask: Tensor | None) -> Tensor:
    return query.new_empty(query.shape)
