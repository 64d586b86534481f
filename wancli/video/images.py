"""Pictures from disk, cut to the size of a video. Imports no numpy at the top."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps, UnidentifiedImageError

from wancli.errors import InputError, missing
from wancli.utils.reading import open_file, unreadable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_HINT = "give a PNG, a JPEG or a WebP"
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM")  # EPS is a program; libtiff talks to stderr


def open_image(path: Path) -> Image.Image:
    """A picture in RGB, turned as its EXIF says, transparency on black. Raises InputError."""
    try:
        with open_file(path) as file, _guarded(), Image.open(file, formats=_FORMATS) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise missing("image", path) from None
    except UnidentifiedImageError:
        raise InputError(f"{path} is no picture.", hint=_HINT) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        most = Image.MAX_IMAGE_PIXELS
        raise InputError(f"{path} has over {most:,} pixels.", hint="scale it down") from None
    except Exception as error:  # noqa: BLE001 - nobody has listed what a broken picture can raise
        raise unreadable(path, error, hint=_HINT) from None


@contextmanager
def _guarded() -> Iterator[None]:
    """Pillow's warning of what is too large is an error here, and its advice is not for users."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def fit_image(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Of (width, height): scaled to cover it, and cut at the centre."""
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def read_image(path: Path, *, size: tuple[int, int]) -> "NDArray[np.uint8]":
    """Uint8 [H, W, 3] of (width, height), fitted. Raises InputError."""
    import numpy as np

    return np.asarray(fit_image(open_image(path), size)).copy()
