"""A tiny decoder for a VAE's latents, TAEHV: 2D convolutions and a memory of one frame a block.

By Ollin Boer Bohan, https://github.com/madebyollin/taehv (MIT); its `taew2_1` is for the latents of
Wan 2.1 and of Wan 2.2 A14B, its `taew2_2` for those of Wan 2.2 TI2V-5B. Written from the
architecture; the keys of its files are kept.
"""

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from wancli.catalog.specs import ModelSpec
from wancli.catalog.tiny_decoder import DECODER, TinyDecoderShape, TinyLayer
from wancli.models.checkpoint import read_pickle
from wancli.models.random_weights import fill

_SOFT_LIMIT = 3.0  # of the latents, in standard deviations


class TinyDecoder(nn.Module):
    """Decodes normalised latents, as the transformer sees them, one latent frame at a time.

    So memory is bounded, and a video is the same bits however its latents are split.
    """

    def __init__(self, shape: TinyDecoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.decoder = nn.ModuleList(_make_layer(layer) for layer in shape.layers)

    @property
    def empty_memory(self) -> list[Tensor | None]:
        """The memory before the first latent frame, an entry for each block."""
        return [None] * sum(isinstance(layer, MemoryBlock) for layer in self.decoder)

    def forward(
        self, latents: Tensor, memory: list[Tensor | None], *, doublings: int | None = None
    ) -> Tensor:
        """Latents [B, C, F, H, W] to video [B, 3, T, H, W] in [-1, 1], not clamped.

        `memory` is that after the frames before, and is replaced, entry by entry, by that after
        these. A video begins with one frame and not `temporal` of them. With fewer `doublings` of
        height and width than levels, the video is smaller, and takes less work.
        """
        doublings = len(self.shape.growth) if doublings is None else doublings
        frames = latents.to(next(self.parameters()).dtype).unbind(2)
        first = self.shape.temporal - 1 if memory[0] is None else 0
        video = torch.cat([self._decode_frame(frame, memory, doublings) for frame in frames], 1)
        return (2 * video[:, first:] - 1).movedim(1, 2).to(latents.dtype)

    def _decode_frame(self, x: Tensor, memory: list[Tensor | None], doublings: int) -> Tensor:
        """[B, C, H, W] to video [B, temporal, 3, H, W] in [0, 1]."""
        batch, block = len(x), 0
        for layer in self.decoder:
            if isinstance(layer, MemoryBlock):
                frames = x.view(batch, -1, *x.shape[1:])
                x = layer(x, _before(frames, memory[block]).flatten(0, 1))
                memory[block] = frames[:, -1:]
                block += 1
            elif isinstance(layer, nn.Upsample):
                x, doublings = (layer(x) if doublings > 0 else x), doublings - 1
            else:
                x = layer(x)
        video = functional.pixel_shuffle(x, self.shape.patch)
        return video.view(batch, -1, *video.shape[1:])


def _before(frames: Tensor, last: Tensor | None) -> Tensor:
    """The frame before each of [B, T, C, H, W]; zeros before the first of a video."""
    last = torch.zeros_like(frames[:, :1]) if last is None else last
    return torch.cat([last, frames[:, :-1]], 1)


def load_tiny_decoder(spec: ModelSpec, *, dtype: torch.dtype, device: torch.device) -> TinyDecoder:
    """The tiny decoder of a spec that has one, of random weights for a random model.

    Raises InputError for a pickle that is broken.
    """
    if spec.tiny_decoder is None:
        raise ValueError(f"{spec.name} has no tiny decoder")
    model, file = TinyDecoder(spec.tiny_decoder), spec.file_of(DECODER)
    if file is None:
        fill(model, seed=0)
    else:
        pickled = file.path.suffix != ".safetensors"
        tensors = read_pickle(file.path) if pickled else load_file(file.path)
        model.load_state_dict({key: tensors[key] for key in spec.tiny_decoder.parameters})
    return model.to(device, dtype).eval().requires_grad_(requires_grad=False)


class SoftClamp(nn.Module):
    """Limits latents smoothly to +-3."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return torch.tanh(x / _SOFT_LIMIT) * _SOFT_LIMIT


class MemoryBlock(nn.Module):
    """A residual block that also sees the frame before (the authors' MemBlock)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _convolution(2 * channels, channels),
            nn.ReLU(),
            _convolution(channels, channels),
            nn.ReLU(),
            _convolution(channels, channels),
        )

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """Frames [N, C, H, W], and the one before each."""
        return functional.relu(self.conv(torch.cat([x, before], 1)) + x)


class Grow(nn.Module):
    """Makes several frames of each (the authors' TGrow)."""

    def __init__(self, channels: int, channels_of_all: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels_of_all, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] to [N n, C, H, W]."""
        grown: Tensor = self.conv(x)
        return grown.reshape(-1, *x.shape[1:])


def _convolution(channels_in: int, channels_out: int, *, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=bias)


def _make_layer(layer: TinyLayer) -> nn.Module:
    kind, inputs, outputs, bias = layer
    if kind == "memory":
        return MemoryBlock(inputs)
    if kind == "grow":
        return Grow(inputs, outputs)
    if kind == "conv":
        return _convolution(inputs, outputs, bias=bias)
    return {"clamp": SoftClamp(), "relu": nn.ReLU(), "upsample": nn.Upsample(scale_factor=2)}[kind]
