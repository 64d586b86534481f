"""Text on pictures, in a font that has its letters."""

import re
import unicodedata
from collections.abc import Iterable, Iterator

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
# Fonts of many letters, under the names by which Pillow finds them on Linux and macOS.
SYSTEM_FONTS = (
    "DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "wqy-microhei.ttc",
    "wqy-zenhei.ttc", "Arial Unicode.ttf", "PingFang.ttc", "AppleSDGothicNeo.ttc",
)  # fmt: skip
_NO_LETTER = "\uffff"  # which every font draws as what it does not have


def choose_font(texts: Iterable[str], size: int) -> Font:
    """Pillow's own font, of ASCII; the system's that lacks the fewest, if it lacks some letters."""
    letters = set("".join(texts))
    lacking = {}
    for font in _fonts(size):
        lacking[font] = len(missing_letters(font, letters))
        if not lacking[font]:
            return font
    return min(lacking, key=lambda font: lacking[font])


def with_letters_of(font: Font, text: str, *, other: str) -> str:
    """A text without the letters that a font lacks: `a` for `ä`, `?` for what has no such form.

    A line of which nothing is left is `other`.
    """
    return "\n".join(_line(font, line, other) for line in text.split("\n"))


def _line(font: Font, line: str, other: str) -> str:
    missing = missing_letters(font, line)
    plain = "".join(_plain(letter) if letter in missing else letter for letter in line)
    missing = missing_letters(font, plain)
    shown = re.sub(f"[{re.escape(''.join(missing))}]+", "?", plain) if missing else plain
    return shown if not line.strip() or re.search(r"\w", shown) else other


def _plain(letter: str) -> str:
    """A letter without its accents."""
    parts = unicodedata.normalize("NFKD", letter)
    return "".join(part for part in parts if not unicodedata.combining(part))


def missing_letters(font: Font, letters: Iterable[str]) -> set[str]:
    """Those of some letters that a font has no glyph for."""
    none = _drawn(font, _NO_LETTER)
    return {one for one in set(letters) if not one.isspace() and _drawn(font, one) == none}


def _drawn(font: Font, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


def _fonts(size: int) -> Iterator[Font]:
    yield ImageFont.load_default(size)
    for name in SYSTEM_FONTS:
        try:
            yield ImageFont.truetype(name, size)
        except OSError:  # not here
            continue
