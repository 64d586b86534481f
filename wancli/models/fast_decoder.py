"""A VAE's decoder that trades the last bits of its output for speed (`FastDecoder`)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    CACHE_T,
    WanCausalConv3d,
    WanResample,
    WanResidualBlock,
    WanRMS_norm,
)
from torch import Tensor, nn
from torch.nn import functional

from wancli.config.precision import LATENTS_PER_CALL
from wancli.models.tiny_decoder import TinyDecoder


@dataclass(frozen=True)
class DecoderSpeedups:
    """What a FastDecoder does differently; each part can be measured alone.

    HunyuanVideo's decoder, which has no causal cache and pads by replication, only gets the dtype.
    """

    dtype: torch.dtype | None = None  # None: the VAE's
    latents_per_call: int = LATENTS_PER_CALL  # after the first call, which takes one
    channels_last: bool = True  # weights and activations in NDHWC; normalise in one pass
    pad_in_convolution: bool = True  # pad by copying along time only
    benchmark: bool = True  # let cuDNN time its kernels once per shape
    compiled: bool = False  # what lies between the convolutions of a residual block


NO_SPEEDUPS = DecoderSpeedups(
    latents_per_call=1, channels_last=False, pad_in_convolution=False, benchmark=False
)


class FastDecoder(nn.Module):
    """Wraps the decoder of a VAE, which then decodes faster and, but for rounding, the same video.

    Takes and returns what the decoder does, in the dtype of the rest of the VAE. The weights are
    converted where they are.
    """

    def __init__(self, decoder: nn.Module, speedups: DecoderSpeedups) -> None:
        super().__init__()
        self.latents_per_call, self._speedups = speedups.latents_per_call, speedups
        self.benchmark = speedups.benchmark
        _speed_up_layers(decoder, speedups)
        self.decoder = decoder.to(speedups.dtype)
        if speedups.channels_last:
            lay_out_channels_last(decoder)

    def forward(self, latents: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Video of latents [B, C, n, H, W], not clamped."""
        layout = torch.channels_last_3d if self._speedups.channels_last else torch.preserve_format
        with _benchmarking(enabled=self.benchmark):
            inputs = latents.to(self._speedups.dtype or latents.dtype, memory_format=layout)
            video: Tensor = self.decoder(inputs, *args, **kwargs)
        return video.to(latents.dtype)


def speed_up_decoder(vae: Any, speedups: DecoderSpeedups) -> None:
    """Replace the decoder of one of diffusers' VAEs by a fast one, before weights are offloaded."""
    if not isinstance(vae, AutoencoderKLWan):
        speedups = replace(NO_SPEEDUPS, dtype=speedups.dtype)
    vae.decoder = FastDecoder(vae.decoder, speedups)


def compile_decoder(vae: Any) -> bool:
    """Compile the VAE's decoder if it is a fast one that is not offloaded by layer; whether it is.

    Pays off after many chunks.
    """
    if not isinstance(vae.decoder, FastDecoder) or next(vae.decoder.parameters()).is_meta:
        return False
    for layer in vae.decoder.modules():
        if isinstance(layer, ChannelsLastResidualBlock):
            layer.compiled = True
    return True


def latents_per_call(vae: Any) -> int:
    """How many latent frames the VAE's decoder takes at once, after the first."""
    return vae.decoder.latents_per_call if isinstance(vae.decoder, FastDecoder) else 1


def benchmark_decoder(vae: Any) -> None:
    """Let cuDNN time its kernels for the VAE's fast decoder: a second or two for each shape."""
    vae.decoder.benchmark = True


def decoder_in_words(vae: Any) -> str:
    """How the VAE decodes, for the record: exact float32, fast bfloat16."""
    ways = {FastDecoder: "fast", TinyDecoder: "tiny"}
    way = ways.get(type(vae.decoder), "exact")
    dtype = next(vae.decoder.parameters()).dtype
    return f"{way} {str(dtype).removeprefix('torch.')}"


class TimePaddedConv3d(WanCausalConv3d):  # type: ignore[misc]
    """A causal convolution that pads by copying along time only: in space, the kernel pads."""

    def __init__(self, convolution: WanCausalConv3d) -> None:
        """Shares the weights of `convolution`."""
        width, _, height, _, lead, _ = convolution._padding
        shape = (convolution.in_channels, convolution.out_channels, convolution.kernel_size)
        with torch.device("meta"):
            super().__init__(*shape, stride=convolution.stride)
        self.weight, self.bias = convolution.weight, convolution.bias
        self.padding, self._lead = (0, height, width), lead

    def forward(
        self, x: Tensor, cache_x: Tensor | None = None, *, cached: int = 0, biased: bool = True
    ) -> Tensor:
        """Convolve [B, C, cached + T, H, W] to T frames; `cache_x`, too, are frames before them.

        Zeros stand for those that are missing. Without the bias if not `biased`.
        """
        if cache_x is not None and self._lead:
            x, cached = torch.cat([cache_x, x], 2), cache_x.shape[2]
        if cached < self._lead:
            x = functional.pad(x, (0, 0, 0, 0, self._lead - cached, 0))
        bias = self.bias if biased else None
        convolved: Tensor = self._conv_forward(x, self.weight, bias)
        return convolved


class ChannelsLastNorm(nn.Module):
    """WanRMS_norm in one pass over channels that are the last dimension in memory."""

    def __init__(self, norm: WanRMS_norm) -> None:
        """Shares the weights of `norm`, which has no bias."""
        super().__init__()
        self.gamma = norm.gamma
        self.epsilon = 1e-24 / norm.gamma.numel()  # of the mean square; norm's is of the root sum

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, C, ...] over C."""
        weight = self.gamma.flatten()
        normalized = functional.rms_norm(x.movedim(1, -1), weight.shape, weight, self.epsilon)
        out: Tensor = normalized.movedim(-1, 1)
        return out


class ActivatedRows(nn.Module):
    """A norm and SiLU of rows, written behind the rows of the frames before them."""

    def __init__(self, norm: ChannelsLastNorm) -> None:
        """Shares the weights of `norm`."""
        super().__init__()
        self.gamma, self.epsilon = norm.gamma, norm.epsilon

    def forward(
        self, rows: Tensor, before: Tensor | None, *, bias: Tensor | None = None,
        compiled: bool = False,
    ) -> Tensor:  # fmt: skip
        """`before` and then the activated rows [..., T, H W, C], to which a bias is added first."""
        function: Callable[..., Tensor] = _activate if bias is None else _activate_biased
        inputs = (rows,) if bias is None else (rows, bias)
        run = _compiled(function) if compiled else function
        return run(*inputs, self.gamma, before, self.epsilon)


class ChannelsLastResidualBlock(nn.Module):
    """WanResidualBlock that writes a convolution's input once, behind the frames before it.

    Each layer reads its own weights, for which offloading by layer fetches them. Only compiled, the
    biases of its convolutions are added by what reads their output.
    """

    def __init__(self, block: WanResidualBlock, *, compiled: bool) -> None:
        """Shares the layers of `block`, which are replaced already."""
        super().__init__()
        self.norm1, self.conv1 = ActivatedRows(block.norm1), block.conv1
        self.norm2, self.conv2 = ActivatedRows(block.norm2), block.conv2
        self.conv_shortcut = block.conv_shortcut
        self.compiled = compiled

    def forward(self, x: Tensor, feat_cache: list[Any], feat_idx: list[int]) -> Tensor:
        """Features [B, C, T, H, W] to [B, C', T, H, W]."""
        first = feat_cache[feat_idx[0]]
        steady = first is not None and first.shape[2] == CACHE_T and first.shape[0] == 1
        if self.compiled and steady:  # graphs for how a video starts would not pay
            return self._forward_compiled(x, feat_cache, feat_idx)
        shortcut: Tensor = self.conv_shortcut(x)
        for norm, convolution in ((self.norm1, self.conv1), (self.norm2, self.conv2)):
            before, cached = feat_cache[feat_idx[0]], 0
            if before is not None:
                before, cached = _rows(before), before.shape[2]
            x = _next_inputs(norm(_rows(x), before), x, feat_cache, feat_idx)
            x = convolution(x, cached=cached)
        return x + shortcut

    def _forward_compiled(self, x: Tensor, feat_cache: list[Any], feat_idx: list[int]) -> Tensor:
        shortcut, bias = self.conv_shortcut(x), None
        for norm, convolution in ((self.norm1, self.conv1), (self.norm2, self.conv2)):
            rows = norm(_rows(x), _rows(feat_cache[feat_idx[0]]), bias=bias, compiled=True)
            x = _next_inputs(rows, x, feat_cache, feat_idx)
            x, bias = convolution(x, cached=CACHE_T, biased=False), convolution.bias
        return _features(_compiled(_add)(_rows(x), bias, _rows(shortcut)), x)


def _next_inputs(rows: Tensor, like: Tensor, feat_cache: list[Any], feat_idx: list[int]) -> Tensor:
    """Rows as the features that a convolution reads, whose last frames are cached."""
    inputs = _features(rows, like)
    feat_cache[feat_idx[0]] = inputs[:, :, -CACHE_T:].clone()
    feat_idx[0] += 1
    return inputs


def _rows(x: Tensor) -> Tensor:
    """[B, C, T, H, W] as [B, T, H W, C], or [T, H W, C] for one video: torch compiles for fewer."""
    rows = x.movedim(1, -1).flatten(2, 3).contiguous()  # a copy only on a CPU
    return (rows[0] if len(rows) == 1 else rows).detach()  # of a view, torch guards the whole


def _features(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_rows`; height and width are those of `like`."""
    return rows.view(like.shape[0], -1, *like.shape[3:], rows.shape[-1]).movedim(-1, 1)


def _activate(rows: Tensor, gamma: Tensor, before: Tensor | None, epsilon: float) -> Tensor:
    """`before` and then the normalised and activated rows [..., T, H W, C]."""
    weight = gamma.flatten()
    activated = functional.silu(
        functional.rms_norm(rows, weight.shape, weight, epsilon), inplace=True
    )
    return activated if before is None else torch.cat([before, activated], -3)


def _activate_biased(
    rows: Tensor, bias: Tensor, gamma: Tensor, before: Tensor | None, epsilon: float
) -> Tensor:
    """The same of rows to which a bias is added first."""
    return _activate(rows + bias, gamma, before, epsilon)


def _add(rows: Tensor, bias: Tensor, shortcut: Tensor) -> Tensor:
    return rows + bias + shortcut


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile a function of rows: once for each number of channels, whatever the video's size."""
    return torch.compile(function, fullgraph=True, dynamic=True)


class ChannelsLastUpsample(nn.Module):
    """WanResample's upsampling without a copy in float32 or in another memory layout."""

    def __init__(self, resample: WanResample) -> None:
        """Shares the layers of `resample`."""
        super().__init__()
        self.time_conv: Any = getattr(resample, "time_conv", None)
        self.convolution = resample.resample[1]

    def forward(
        self, x: Tensor, feat_cache: list[Any] | None = None, feat_idx: list[int] | None = None
    ) -> Tensor:
        """Double height and width of [B, C, T, H, W] and, if it has a `time_conv`, the frames."""
        if self.time_conv is not None and feat_cache is not None and feat_idx is not None:
            x = self._double_frames(x, feat_cache, feat_idx)
        frames = x.movedim(2, 1).flatten(0, 1)
        frames = functional.interpolate(frames, scale_factor=(2.0, 2.0), mode="nearest-exact")
        convolved: Tensor = self.convolution(frames)
        return convolved.view(x.shape[0], x.shape[2], *convolved.shape[1:]).movedim(1, 2)

    def _double_frames(self, x: Tensor, feat_cache: list[Any], feat_idx: list[int]) -> Tensor:
        """All but the very first frame, which the cache marks by diffusers' "Rep"."""
        at = feat_idx[0]
        feat_idx[0] += 1
        before = feat_cache[at]
        if before is None:
            feat_cache[at] = "Rep"
            return x
        before = None if isinstance(before, str) else before
        feat_cache[at] = _last_two(before, x)
        pairs: Tensor = self.time_conv(x, before).unflatten(1, (2, -1))  # [B, 2, C, T, H, W]
        return pairs.permute(0, 3, 1, 4, 5, 2).flatten(1, 2).movedim(-1, 1)


def _last_two(before: Tensor | None, x: Tensor) -> Tensor:
    """The last two frames of `before` (zeros if None) and x [B, C, T, H, W], as a copy."""
    last = x[:, :, -2:]
    if last.shape[2] == 2:
        return last.clone()
    return torch.cat([torch.zeros_like(last) if before is None else before[:, :, -1:], last], 2)


def _speed_up_layers(decoder: nn.Module, speedups: DecoderSpeedups) -> None:
    """Replace the layers of Wan's decoder that have a faster equivalent."""
    if speedups.pad_in_convolution:
        replace_layers(decoder, WanCausalConv3d, TimePaddedConv3d)
    if speedups.channels_last:
        replace_layers(decoder, WanRMS_norm, ChannelsLastNorm)
        replace_layers(decoder, WanResample, ChannelsLastUpsample)
        for layer in decoder.modules():
            if isinstance(layer, nn.SiLU):
                layer.inplace = True  # its input is a norm's output, which nothing else reads
    if speedups.pad_in_convolution and speedups.channels_last:
        block = partial(ChannelsLastResidualBlock, compiled=speedups.compiled)
        replace_layers(decoder, WanResidualBlock, block)


def replace_layers(decoder: nn.Module, kind: type, faster: Callable[[Any], nn.Module]) -> None:
    """Replace every layer of a kind."""
    for parent in list(decoder.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, kind):
                setattr(parent, name, faster(layer))


def lay_out_channels_last(decoder: nn.Module) -> None:
    """Store the weights of convolutions with the channels last."""
    for layer in decoder.modules():
        if isinstance(layer, nn.Conv3d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(layer, nn.Conv2d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)


@contextmanager
def _benchmarking(*, enabled: bool) -> Iterator[None]:
    """Let cuDNN time its kernels for convolutions in the block."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = enabled or before
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
