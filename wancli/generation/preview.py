"""Preview a video while it is denoised: a small picture beside it, every few steps."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from wancli.catalog.decoder_files import find_tiny_decoder
from wancli.catalog.tiny_decoder import DECODER
from wancli.errors import OutputError
from wancli.generation.denoise import StepResult
from wancli.models.latent_rgb import fit_rgb
from wancli.models.load import Loaded
from wancli.models.tiny_decoder import TinyDecoder, load_tiny_decoder
from wancli.models.vae import to_pixels
from wancli.records.progress import PreviewEvent, Report
from wancli.utils.files import remove, write_whole
from wancli.utils.outputs import PREVIEW_MARK, preview_file

# Latents [1, C, F, H, W] and indices of their frames to uint8 [len(indices), H, W, 3] on the CPU.
FrameDecoder = Callable[[Tensor, Sequence[int]], Tensor]

_FRAMES = 4  # latent frames, from the first to the last
_SIDE = 192  # pixels of the longer side of one of them


class Previews:
    """The preview beside a video, updated every `every` denoising steps; None for no preview."""

    def __init__(
        self, video: Path | None, report: Report, *, every: int | None, overwrite: bool = False
    ) -> None:
        """Previews are also passed to `report`.

        An existing file is kept unless `overwrite`; previews are then only reported, as they are
        without a `video`.
        """
        self._file = preview_file(video) if video else None
        self._report, self._every, self._mine = report, every, overwrite
        self._before: Tensor | None = None
        self._decode: FrameDecoder | None = None

    def __call__(self, step: StepResult, loaded: Loaded) -> None:
        """Update the preview after a step; the latents are not changed."""
        if self._every is None:
            return
        before, self._before = self._before, step.latents
        if (step.index + 1) % self._every:
            return
        if self._decode is None:
            self._decode = frame_decoder(loaded)
        clean = predict_clean(step, before)
        count = clean.shape[2]
        indices = np.linspace(0, count - 1, min(_FRAMES, count)).round().astype(int).tolist()
        content = _strip(self._decode(clean, indices))
        if self._file:
            with suppress(OutputError):  # on a full disk, writing the video reports it
                write_whole(self._file, content, hint="", overwrite=self._mine)
                self._mine = True
        self._report(PreviewEvent(content))

    def remove(self) -> None:
        """Remove the preview, once the video is written or has failed."""
        if self._every is not None and self._file and self._mine:
            remove(self._file)


@contextmanager
def previews(
    video: Path | None, report: Report, *, every: int | None, overwrite: bool = False
) -> Iterator[Previews]:
    """Previews that are removed when the block ends."""
    preview = Previews(video, report, every=every, overwrite=overwrite)
    try:
        yield preview
    finally:
        preview.remove()


def frame_decoder(loaded: Loaded) -> FrameDecoder:
    """The model's tiny decoder, where it is on this machine, or else a linear map to colours."""
    spec = loaded.spec
    spec = spec if spec.file_of(DECODER) else find_tiny_decoder(spec) or spec
    if spec.file_of(DECODER) is None:
        to_rgb = fit_rgb(loaded.pipeline.vae)
        return lambda latents, indices: to_rgb(latents[:, :, [*indices]])
    dtype = torch.float32 if loaded.device.type == "cpu" else torch.bfloat16
    return partial(_decode_frames, load_tiny_decoder(spec, dtype=dtype, device=loaded.device))


@torch.no_grad()
def _decode_frames(decoder: TinyDecoder, latents: Tensor, indices: Sequence[int]) -> Tensor:
    """Some latent frames of [1, C, F, H, W], each after the one before it, at about `_SIDE`."""
    size, levels = max(latents.shape[-2:]) * decoder.shape.patch, len(decoder.shape.growth)
    doublings = min(levels, math.ceil(math.log2(max(1, _SIDE / size))))
    pictures = []
    for index in indices:
        pair = latents[:, :, [max(0, index - 1), index]]
        video = decoder(pair.float(), decoder.empty_memory, doublings=doublings)
        pictures.append(to_pixels(video[:, :, -1:])[0])
    return torch.cat(pictures)


def predict_clean(step: StepResult, before: Tensor | None) -> Tensor:
    """Extrapolate the latents before and after a step linearly to sigma 0.

    Independent of the solver and its state. After the first step the latents before it are not
    known, and the noisy ones are returned.
    """
    if step.clean is not None:
        return step.clean
    if before is None:
        return step.latents
    velocity = (before - step.latents) / (step.sigma - step.after)
    return step.latents - step.after * velocity


def _strip(frames: Tensor) -> bytes:
    """Uint8 [F, H, W, 3] as one PNG, side by side."""
    _, height, width, _ = frames.shape
    scale = max(1, _SIDE // max(height, width))
    row = Image.fromarray(np.concatenate(list(frames.numpy()), axis=1))
    picture = row.resize((row.width * scale, row.height * scale), Image.Resampling.BICUBIC)
    about = PngInfo()
    about.add_text(*PREVIEW_MARK)
    file = BytesIO()
    picture.save(file, "PNG", pnginfo=about)
    return file.getvalue()
