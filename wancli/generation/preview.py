"""Preview a video while it is denoised: a small picture beside it, every few steps."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from wancli.errors import OutputError
from wancli.generation.denoise import StepResult
from wancli.models.latent_rgb import LatentRgb, fit_rgb
from wancli.records.progress import PreviewEvent, Report
from wancli.utils.files import remove, write_whole
from wancli.utils.outputs import PREVIEW_MARK, preview_file

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
        self._map: LatentRgb | None = None

    def __call__(self, step: StepResult, vae: Any) -> None:
        """Update the preview after a step; the latents are not changed."""
        if self._every is None:
            return
        before, self._before = self._before, step.latents
        if (step.index + 1) % self._every:
            return
        if self._map is None:
            self._map = fit_rgb(vae)
        clean = predict_clean(step, before)
        count = clean.shape[2]
        indices = np.linspace(0, count - 1, min(_FRAMES, count)).round().astype(int).tolist()
        content = _strip(self._map(clean[:, :, indices]))
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
