"""Read pictures, scaled and cropped to the size of a video. Imports no numpy at the top."""

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
# No EPS, which is a program; no TIFF: libtiff writes to stderr.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM")


def open_image(path: Path) -> Image.Image:
    """Read a picture in RGB, rotated by its EXIF, transparency on white. Raises InputError.

    Pillow and not imageio, which does not restrict formats or bound the number of pixels.
    """
    try:
        with open_file(path) as file, _guarded(), Image.open(file, formats=_FORMATS) as image:
            return _in_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise missing("image", path) from None
    except UnidentifiedImageError:
        raise InputError(f"{path} is not a picture.", hint=_HINT) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        most = Image.MAX_IMAGE_PIXELS
        raise InputError(f"{path} has over {most:,} pixels.", hint="scale it down") from None
    except Exception as error:  # noqa: BLE001 - a broken picture can raise anything
        raise unreadable(path, error, hint=_HINT) from None


def _in_rgb(image: Image.Image) -> Image.Image:
    """8 bits a channel. Pillow's conversion alone cuts off 16 bits, and bares what is hidden."""
    if image.mode.startswith("I"):
        image = image.point(lambda level: level * (1 / 257) + 0.5).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@contextmanager
def _guarded() -> Iterator[None]:
    """Make Pillow's warning about too many pixels an error, and hide its other warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def fit_image(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale to cover (width, height), and crop at the centre."""
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS)


def read_image(path: Path, *, size: tuple[int, int]) -> "NDArray[np.uint8]":
    """Read a picture as uint8 [H, W, 3], fitted to (width, height). Raises InputError."""
    import numpy as np

    return np.asarray(fit_image(open_image(path), size)).copy()
