"""Videos as pictures: contact sheets, and animations small enough for a page."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from wancli.errors import UsageError
from wancli.utils.files import write_whole
from wancli.video.read import VideoInfo, probe, stream_frames

if TYPE_CHECKING:
    from numpy.typing import NDArray

_GAP = 8  # pixels between pictures
_TEXT = 14  # pixels of a line of text
_PAPER, _INK = "#1b1b1f", "#d8d8de"
_GIF_TICK_S = 0.01  # what a GIF counts in
_GIF_FASTEST = 50  # frames per second; shorter than two ticks is shown as ten
_LONGEST_S = 600  # of a frame; a GIF has 16 bits for its ticks
_GIF_LARGEST = 2**29  # bytes of frames; Pillow holds them all, one a pixel
_HINT = "free some space, or choose another place"


@dataclass(frozen=True)
class Picture:
    """The bytes of a file, in pixels, with that many pictures of a video in it."""

    content: bytes
    width: int
    height: int
    frames: int

    def write(self, target: Path, *, overwrite: bool = False) -> None:
        """Put it into a file. Raises OutputError."""
        write_whole(target, self.content, hint=_HINT, overwrite=overwrite)


@dataclass(frozen=True)
class SheetLayout:
    """Pictures of one video on a sheet; `width` of a picture in pixels."""

    rows: int = 3
    columns: int = 4
    width: int = 240


def draw_sheet(videos: Sequence[Path], grid: SheetLayout) -> Picture:
    """A contact sheet of videos as PNG, one below the other. Raises InputError.

    Pictures are evenly spaced from the first video frame to the last; number and time stand below.
    """
    blocks = [_block(video, grid, named=len(videos) > 1) for video in videos]
    sheet = Image.new(
        "RGB", (max(b.width for b, _ in blocks), sum(b.height for b, _ in blocks)), _PAPER
    )
    top = 0
    for block, _ in blocks:
        sheet.paste(block, (0, top))
        top += block.height
    content = io.BytesIO()
    sheet.save(content, "PNG")
    return Picture(content.getvalue(), *sheet.size, sum(frames for _, frames in blocks))


def draw_animation(video: Path, *, gif: bool, width: int | None, fps: float | None) -> Picture:
    """A GIF, or else a WebP, that plays again and again.

    At `fps` of the video's frames a second, all of them if None. Raises InputError, UsageError.
    """
    info = probe(video)
    fastest = min(info.fps, _GIF_FASTEST) if gif else info.fps
    rate = fastest if fps is None else fps
    if not 0 < rate <= fastest:
        what = "a GIF shows at most" if fastest < info.fps else f"{video} has"
        message = f"--fps {rate:g}: {what} {fastest:g} frames a second."
        raise UsageError(message, hint=f"--fps {fastest:g}")
    if 1 / rate > _LONGEST_S:
        raise UsageError(
            f"--fps {rate:g}: a frame would be shown for over {_LONGEST_S} s.", hint="--fps 1"
        )
    size = _fitted(info, width or info.width)
    taken = [
        int(i * info.fps / rate + 1e-6) for i in range(max(1, round(info.frames * rate / info.fps)))
    ]
    if gif and len(taken) * size[0] * size[1] > _GIF_LARGEST:
        raise UsageError(
            f"a GIF of {len(taken)} frames of {size[0]}x{size[1]} is too large.",
            hint="--webp, or a smaller --width or --fps",
        )
    tick = _GIF_TICK_S if gif else 0.001
    ends = [round(i / rate / tick) for i in range(len(taken) + 1)]  # so that rounding cannot add up
    durations = [round(1000 * tick * (b - a)) for a, b in pairwise(ends)]
    pictures = (
        picture.resize(size, Image.Resampling.LANCZOS) for picture in _taken(video, info, taken)
    )
    first, content = next(pictures), io.BytesIO()
    first.save(
        content,
        "GIF" if gif else "WEBP",
        save_all=True,
        append_images=pictures,
        duration=durations,
        loop=0,
    )
    return Picture(content.getvalue(), *size, len(taken))


def _block(video: Path, grid: SheetLayout, *, named: bool) -> tuple[Image.Image, int]:
    """One video's part of a sheet, and how many pictures are on it."""
    info = probe(video)
    size = _fitted(info, grid.width)
    count = min(grid.rows * grid.columns, info.frames)
    taken = np.linspace(0, info.frames - 1, count).round().astype(int).tolist()
    columns = min(grid.columns, count)
    rows = -(-count // columns)
    cell = (size[0] + _GAP, size[1] + _TEXT + _GAP)
    head = _TEXT + _GAP if named else 0
    block = Image.new("RGB", (columns * cell[0] + _GAP, rows * cell[1] + _GAP + head), _PAPER)
    draw, font = ImageDraw.Draw(block), ImageFont.load_default(_TEXT - 2)
    if named:
        draw.text((_GAP, _GAP), video.name, _INK, font)
    for place, (number, picture) in enumerate(zip(taken, _taken(video, info, taken), strict=True)):
        left = _GAP + place % columns * cell[0]
        top = _GAP + head + place // columns * cell[1]
        block.paste(picture.resize(size, Image.Resampling.LANCZOS), (left, top))
        draw.text((left, top + size[1]), f"{number}  {number / info.fps:.2f} s", _INK, font)
    return block, count


def _taken(video: Path, info: VideoInfo, numbers: Sequence[int]) -> Iterator[Image.Image]:
    """Those video frames, in order, one at a time."""
    frames: Iterator[NDArray[np.uint8]] = stream_frames(video, info=info, chunk=1)
    wanted = iter(numbers)
    next_one = next(wanted, None)
    for number, frame in enumerate(frames):
        if number == next_one:
            yield Image.fromarray(frame[0])
            next_one = next(wanted, None)
        if next_one is None:
            return


def _fitted(info: VideoInfo, width: int) -> tuple[int, int]:
    """Width and height in pixels, of the video's shape."""
    return width, max(1, round(info.height * width / info.width))
