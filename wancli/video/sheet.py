"""Contact sheets and small animations (GIF, WebP) of videos."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageDraw

from wancli.errors import UsageError
from wancli.utils.files import write_whole
from wancli.video.lettering import choose_font, with_letters_of
from wancli.video.read import VideoInfo, probe, stream_frames
from wancli.video.signature import sign

if TYPE_CHECKING:
    from numpy.typing import NDArray

_GAP = 8  # pixels between pictures
_TEXT = 14  # pixels of a line of text
PAPER, INK = "#1b1b1f", "#d8d8de"
_GIF_TICK_S = 0.01  # unit of durations in a GIF
_GIF_MAX_FPS = 50  # browsers slow down frames of less than two ticks
_MAX_FRAME_S = 600  # a GIF has 16 bits for the ticks of a frame
_GIF_MAX_PIXELS = 2**29  # of all frames, which are in memory at once
_HINT = "free some space, or choose another place"


@dataclass(frozen=True)
class Picture:
    """An encoded and signed picture: its size in pixels, and how many video frames it shows."""

    content: bytes
    width: int
    height: int
    frames: int

    def write(self, target: Path, *, overwrite: bool = False) -> None:
        """Write it to a file. Raises OutputError."""
        write_whole(target, self.content, hint=_HINT, overwrite=overwrite)


@dataclass(frozen=True)
class SheetLayout:
    """Grid of one video's pictures; `width` of a picture in pixels."""

    rows: int
    columns: int
    width: int


def draw_sheet(videos: Sequence[Path], grid: SheetLayout) -> Picture:
    """Draw a contact sheet of videos, one below the other, as PNG. Raises InputError.

    Pictures are evenly spaced from the first video frame to the last, with number and time below.
    """
    blocks = [_block(video, grid, named=len(videos) > 1) for video in videos]
    sheet = Image.new(
        "RGB", (max(b.width for b, _ in blocks), sum(b.height for b, _ in blocks)), PAPER
    )
    top = 0
    for block, _ in blocks:
        sheet.paste(block, (0, top))
        top += block.height
    content = iio.imwrite("<bytes>", np.asarray(sheet), extension=".png", plugin="pillow")
    return Picture(sign(content, videos), *sheet.size, sum(frames for _, frames in blocks))


def middle_frame(video: Path, info: VideoInfo) -> Image.Image:
    """The middle frame of a video. Raises InputError."""
    (frame,) = _frames_at(video, info, [info.frames // 2])
    return frame


def thumbnail(video: Path, info: VideoInfo, *, width: int) -> bytes:
    """The middle frame of a video as WebP, of at most that width. Raises InputError."""
    frame = middle_frame(video, info)
    frame.thumbnail((width, 2 * width), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    frame.save(content, "WEBP", quality=75)
    return content.getvalue()


def draw_animation(video: Path, *, gif: bool, width: int | None, fps: float | None) -> Picture:
    """Encode a video as a GIF or a WebP that loops.

    At `fps` frames per second, or the video's rate if None. Raises InputError, UsageError.
    """
    info = probe(video)
    fastest = min(info.fps, _GIF_MAX_FPS) if gif else info.fps
    rate = fastest if fps is None else fps
    if not 0 < rate <= fastest:
        limit = "a GIF shows at most" if fastest < info.fps else f"{video} has"
        message = f"`fps {rate:g}`: {limit} {fastest:g} frames a second."
        raise UsageError(message, hint=f"`fps {fastest:g}`")
    if 1 / rate > _MAX_FRAME_S:
        raise UsageError(
            f"`fps {rate:g}`: a frame would be shown for over {_MAX_FRAME_S} s.", hint="`fps 1`"
        )
    size = _fitted(info, width or info.width)
    count = max(1, round(info.frames * rate / info.fps))
    if gif and count * size[0] * size[1] > _GIF_MAX_PIXELS:
        raise UsageError(
            f"a GIF of {count} frames of {size[0]}x{size[1]} is too large.",
            hint="`webp`, or a smaller `width` or `fps`",
        )
    numbers = [int(i * info.fps / rate + 1e-6) for i in range(count)]
    tick = _GIF_TICK_S if gif else 0.001
    ends = [round(i / rate / tick) for i in range(count + 1)]  # so that rounding errors cancel
    durations = [round(1000 * tick * (b - a)) for a, b in pairwise(ends)]
    # Pillow refuses a list for a single frame.
    duration = durations if count > 1 else durations[0]
    content = io.BytesIO()
    extension = ".gif" if gif else ".webp"
    file: Any = iio.imopen(content, "w", extension=extension, plugin="pillow")
    with file:
        for frame in _frames_at(video, info, numbers):
            picture = frame.resize(size, Image.Resampling.LANCZOS)
            file.write(np.asarray(picture), duration=duration, loop=0)
    return Picture(sign(content.getvalue(), [video]), *size, count)


def _block(video: Path, grid: SheetLayout, *, named: bool) -> tuple[Image.Image, int]:
    """The block of one video on a sheet, and its number of pictures."""
    info = probe(video)
    size = _fitted(info, grid.width)
    count = min(grid.rows * grid.columns, info.frames)
    numbers = np.linspace(0, info.frames - 1, count).round().astype(int).tolist()
    columns = min(grid.columns, count)
    rows = -(-count // columns)
    cell = (size[0] + _GAP, size[1] + _TEXT + _GAP)
    head = _TEXT + _GAP if named else 0
    block = Image.new("RGB", (columns * cell[0] + _GAP, rows * cell[1] + _GAP + head), PAPER)
    draw, font = ImageDraw.Draw(block), choose_font([video.name if named else ""], _TEXT - 2)
    if named:
        draw.text((_GAP, _GAP), with_letters_of(font, video.name, other="video"), INK, font)
    pictures = zip(numbers, _frames_at(video, info, numbers), strict=True)
    for index, (number, picture) in enumerate(pictures):
        left = _GAP + index % columns * cell[0]
        top = _GAP + head + index // columns * cell[1]
        block.paste(picture.resize(size, Image.Resampling.LANCZOS), (left, top))
        draw.text((left, top + size[1]), f"{number}  {number / info.fps:.2f} s", INK, font)
    return block, count


def _frames_at(video: Path, info: VideoInfo, numbers: Sequence[int]) -> Iterator[Image.Image]:
    """The video frames of these numbers, in order, one at a time."""
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
    """(width, height) in pixels, with the aspect ratio of the video."""
    return width, max(1, round(info.height * width / info.width))
