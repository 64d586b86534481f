"""What a video will be, seen before it is: a small picture beside it, every few steps."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from wancli.errors import OutputError
from wancli.generate.denoise import StepResult
from wancli.models.latent_rgb import LatentRgb, fit_rgb
from wancli.records.progress import PreviewEvent, Report
from wancli.utils.files import remove, write_whole
from wancli.utils.outputs import PREVIEW_MARK, preview_file

_SHOWN = 4  # latent frames, from the first to the last
_SIDE = 192  # pixels of the longer side of one of them


class Previews:
    """The picture beside a video, replaced every `every` denoising steps; none if that is None."""

    def __init__(
        self, video: Path, report: Report, *, every: int | None, overwrite: bool = False
    ) -> None:
        """`report` hears of every picture, and may show it.

        One that is there stays, unless `overwrite`, and the new ones are only reported.
        """
        self._file, self._report, self._every = preview_file(video), report, every
        self._mine = overwrite
        self._before: Tensor | None = None
        self._map: LatentRgb | None = None

    def __call__(self, step: StepResult, vae: Any) -> None:
        """Show where the last steps lead. The latents stay as they are."""
        if self._every is None:
            return
        before, self._before = self._before, step.latents
        if (step.index + 1) % self._every:
            return
        if self._map is None:
            self._map = fit_rgb(vae)
        clean = predict_clean(step, before)
        count = clean.shape[2]
        taken = np.linspace(0, count - 1, min(_SHOWN, count)).round().astype(int).tolist()
        content = _strip(self._map(clean[:, :, taken]))
        with suppress(OutputError):  # where a picture does not fit, the video will say so
            write_whole(self._file, content, hint="", overwrite=self._mine)
            self._mine = True
        self._report(PreviewEvent(content))

    def remove(self) -> None:
        """The video is there, or will not come."""
        if self._every is not None and self._mine:
            remove(self._file)


@contextmanager
def previews(
    video: Path, report: Report, *, every: int | None, overwrite: bool = False
) -> Iterator[Previews]:
    """Pictures until the block ends, however it ends."""
    shown = Previews(video, report, every=every, overwrite=overwrite)
    try:
        yield shown
    finally:
        shown.remove()


def predict_clean(step: StepResult, before: Tensor | None) -> Tensor:
    """Where the line through the latents before and after a step meets sigma 0.

    This holds for every solver and needs nothing of its state. After the first step nobody knows
    the latents before it, and they are shown with their noise.
    """
    if before is None:
        return step.latents
    velocity = (before - step.latents) / (step.sigma - step.after)
    return step.latents - step.after * velocity


def _strip(frames: Tensor) -> bytes:
    """Uint8 [F, H, W, 3] as a PNG, side by side."""
    _, height, width, _ = frames.shape
    scale = max(1, _SIDE // max(height, width))
    row = Image.fromarray(np.concatenate(list(frames.numpy()), axis=1))
    content, about = io.BytesIO(), PngInfo()
    about.add_text(*PREVIEW_MARK)
    row.resize((row.width * scale, row.height * scale), Image.Resampling.BICUBIC).save(
        content, "PNG", pnginfo=about
    )
    return content.getvalue()
