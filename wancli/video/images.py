"""Pictures from disk, cut to the size of a video."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from wancli.errors import InputError, missing


def read_image(path: Path, *, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Uint8 [H, W, 3] of (width, height): scaled to cover it, and cut at the centre.

    Turned as its EXIF says, transparency on black. Raises InputError.
    """
    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file).convert("RGB")
    except FileNotFoundError:
        raise missing("image", path) from None
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise InputError(
            f"cannot read {path}: {error}".splitlines()[0], hint="give a PNG or a JPEG"
        ) from None
    return np.asarray(ImageOps.fit(upright, size, Image.Resampling.LANCZOS)).copy()
