"""The demo's models for training on CUDA: what diffusers computes, by a third of the kernels.

Its layers are so small that a step takes as long as its kernels are many. So a bfloat16 copy of the
weights takes the place of autocast's casts, the modulation of a latent frame is computed once and
not for each of its tokens, and queries and keys are rotated together, as complex numbers.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeVar

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanResample,
    WanRMS_norm,
)
from torch import Tensor, nn
from torch.nn import functional

from wancli.demo.causal import QuerySpan, attend_spans
from wancli.models.fast_decoder import (
    ChannelsLastNorm,
    ChannelsLastUpsample,
    TimePaddedConv3d,
    lay_out_channels_last,
    replace_layers,
)

Model = TypeVar("Model", bound=nn.Module)

_FLOAT32 = ("time_embedder", "scale_shift_table")  # as in diffusers


class HalfCopy(Generic[Model]):
    """A bfloat16 copy of a model, whose gradients become those of the model.

    Without `enabled` it is the model itself.
    """

    def __init__(self, model: Model, *, enabled: bool = True) -> None:
        self.model = copy.deepcopy(model) if enabled else model
        for name, p in self.model.named_parameters() if enabled else ():
            if not any(part in name for part in _FLOAT32):
                p.data = p.data.bfloat16()
        both = zip(model.parameters(), self.model.parameters(), strict=True)
        self._pairs = list(both) if enabled else []

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weights, and clear the gradients."""
        for _, p in self._pairs:
            p.grad = None
        _copy((ours, whole) for whole, ours in self._pairs)

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Give the gradients to the model."""
        gradients = [(p, ours.grad) for p, ours in self._pairs if ours.grad is not None]
        for p, _ in gradients:
            p.grad = torch.empty_like(p)
        _copy((p.grad, gradient) for p, gradient in gradients if p.grad is not None)


def _copy(pairs: Iterable[tuple[Tensor, Tensor | None]]) -> None:
    """Copy to the first of each pair from the second."""
    to, source = list[Tensor](), list[Tensor]()
    for one, other in pairs:
        if other is not None:
            to.append(one)
            source.append(other)
    if to:
        torch._foreach_copy_(to, source)


def make_lean_autoencoder(
    vae: AutoencoderKLWan, *, enabled: bool = True
) -> HalfCopy[AutoencoderKLWan]:
    """A bfloat16 copy with fused layers, which stores its weights with the channels last."""
    half = HalfCopy(vae, enabled=enabled)
    if enabled:
        replace_layers(half.model, WanCausalConv3d, TimePaddedConv3d)
        replace_layers(half.model, WanRMS_norm, ChannelsLastNorm)
        replace_layers(half.model.decoder, WanResample, ChannelsLastUpsample)
        lay_out_channels_last(half.model)
    return half


def lean_velocity(
    transformer: WanTransformer3DModel,
    latents: Tensor,
    timesteps: Tensor,
    embeddings: Tensor,
    *,
    spans: Sequence[QuerySpan] | None = None,
) -> Tensor:
    """Velocity [B, C, F, H, W] of latents, as the transformer's own forward returns it.

    timesteps are [B, F], one per latent frame, or [B, 1]; spans are the keys of runs of queries.
    """
    cos, sin = transformer.rope(latents)
    angles = torch.complex(cos[0, :, :, 0::2].float(), sin[0, :, :, 1::2].float())  # [L, 1, D / 2]
    x = transformer.patch_embedding(latents.to(transformer.patch_embedding.weight.dtype))
    frames, rows, columns = x.shape[2:]
    x = x.flatten(2).transpose(1, 2)
    time, modulation, text, _ = transformer.condition_embedder(
        timesteps.flatten(), embeddings.to(x.dtype), timestep_seq_len=timesteps.shape[1]
    )
    blocks: Any = transformer.blocks
    tables = torch.stack([block.scale_shift_table[0] for block in blocks])  # [layers, 6, D]
    scales = torch.arange(6, device=x.device)[:, None] % 3 == 1  # 1 is added to the scales
    modulation = modulation.unflatten(2, (1, 6, -1)) + (tables + scales)  # [B, F, layers, 6, D]
    for block, part in zip(blocks, modulation.unbind(2), strict=True):
        x = _block(block, x, text, part.unsqueeze(3).unbind(2), angles, spans)
    shift, scale = (transformer.scale_shift_table[:, None] + time[:, :, None]).chunk(2, 2)
    x = _modulate(x, shift, 1 + scale, eps=transformer.norm_out.eps)
    patch: Any = transformer.config.patch_size
    x = transformer.proj_out(x).unflatten(2, (*patch, -1)).unflatten(1, (frames, rows, columns))
    velocity: Tensor = x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6).flatten(4, 5).flatten(2, 3)
    return velocity


def _block(
    block: Any,
    x: Tensor,
    text: Tensor,
    modulation: Sequence[Tensor],
    angles: Tensor,
    spans: Sequence[QuerySpan] | None,
) -> Tensor:
    """A transformer block on [B, tokens, D]; modulation are six tensors [B, frames, 1, D]."""
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation
    attn, cross, eps = block.attn1, block.attn2, block.norm1.eps
    y = _modulate(x, shift, scale, eps=eps)
    query, key = _rotate(
        _normalize(attn.norm_q, attn.to_q(y)), _normalize(attn.norm_k, attn.to_k(y)),
        angles, attn.heads,
    )  # fmt: skip
    value = attn.to_v(y).unflatten(2, (attn.heads, -1))
    y = attn.to_out[0](attend_spans(query, key, value, spans).flatten(2))
    x = _add(x, y, gate)
    norm = block.norm2
    y = functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    query = _normalize(cross.norm_q, cross.to_q(y))
    key = _normalize(cross.norm_k, cross.to_k(text))
    query, key, value = (
        part.unflatten(2, (cross.heads, -1)) for part in (query, key, cross.to_v(text))
    )
    x = x + cross.to_out[0](attend_spans(query, key, value).flatten(2))
    y = block.ffn(_modulate(x, ffn_shift, ffn_scale, eps=eps))
    return _add(x, y, ffn_gate)


def _normalize(norm: Any, x: Tensor) -> Tensor:
    """Diffusers' RMSNorm of x [..., D], fused."""
    return functional.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float) -> Tensor:
    """Normalize, scale and shift x [B, tokens, D] by [B, frames, 1, D]."""
    y = _by_frame(functional.layer_norm(x, x.shape[-1:], eps=eps), shift.shape[1])
    return torch.addcmul(shift, y, scale).flatten(1, 2).to(x.dtype)


def _add(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y, for x and y [B, tokens, D] and gate [B, frames, 1, D]."""
    x_frames, y_frames = (_by_frame(t, gate.shape[1]) for t in (x, y))
    return torch.addcmul(x_frames, y_frames, gate).flatten(1, 2).to(x.dtype)


def _by_frame(x: Tensor, frames: int) -> Tensor:
    """View [B, tokens, D] as [B, frames, tokens of a frame, D]."""
    return x.view(len(x), frames, -1, x.shape[-1])


def _rotate(query: Tensor, key: Tensor, angles: Tensor, heads: int) -> Sequence[Tensor]:
    """Rotate [B, tokens, D] each by angles [tokens, 1, D / 2]; returns [B, tokens, heads, D]."""
    both = torch.cat([query, key], 2).float().view(*query.shape[:2], 2 * heads, -1, 2)
    turned = torch.view_as_real(torch.view_as_complex(both) * angles)
    return torch.split(turned.flatten(3).to(query.dtype), heads, 2)
