"""Pictures from disk, cut to the size of a video. Imports no numpy at the top."""

from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps, UnidentifiedImageError

from wancli.errors import InputError, missing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def open_image(path: Path) -> Image.Image:
    """A picture in RGB, turned as its EXIF says, transparency on black. Raises InputError."""
    try:
        with Image.open(path) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except FileNotFoundError:
        raise missing("image", path) from None
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise InputError(
            f"cannot read {path}: {error}".splitlines()[0], hint="give a PNG or a JPEG"
        ) from None


def fit_image(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Of (width, height): scaled to cover it, and cut at the centre."""
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def read_image(path: Path, *, size: tuple[int, int]) -> "NDArray[np.uint8]":
    """Uint8 [H, W, 3] of (width, height), fitted. Raises InputError."""
    import numpy as np

    return np.asarray(fit_image(open_image(path), size)).copy()
