"""Pictures are read as they are seen: 8 bits a channel, opaque."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wancli.video.images import open_image

RED = (200, 0, 0)


def with_alpha(alpha: int) -> Image.Image:
    return Image.new("RGBA", (2, 2), (*RED, alpha))


def in_palette() -> Image.Image:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, *RED])
    image.info["transparency"] = 1
    return image


PICTURES = {
    "opaque": (with_alpha(255), RED),
    "of colours that nobody sees": (with_alpha(0), (255, 255, 255)),
    "half transparent": (with_alpha(128), (227, 127, 127)),
    "gray with alpha": (Image.new("LA", (2, 2), (9, 0)), (255, 255, 255)),
    "with a transparent colour": (in_palette(), (255, 255, 255)),
    "gray of 16 bits": (Image.fromarray(np.full((2, 2), 128 * 257, np.uint16)), (128, 128, 128)),
    "white of 16 bits": (Image.fromarray(np.full((2, 2), 65535, np.uint16)), (255, 255, 255)),
}


@pytest.mark.parametrize(("image", "seen"), PICTURES.values(), ids=PICTURES)
def test_transparency_is_white_and_16_bits_are_scaled(
    tmp_path: Path, image: Image.Image, seen: tuple[int, int, int]
):
    image.save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == seen
