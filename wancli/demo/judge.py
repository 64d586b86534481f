"""Judge what a video shows from its pixels alone: the examiner of the demo model.

It knows the world's palette and outlines, never the prompt. Every attribute can come out as `NONE`:
a judge that always picks the nearest word calls mush a success. The limits lie between what true
renders measure (overlap 0.97, lead 0.13, edge 1 pixel) and what blobs do: see its tests.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wancli.demo.world import BACKGROUNDS, COLORS, FPS, SHADE, SHAPES, Combination
from wancli.demo.world import _around as around
from wancli.demo.world import _distance as distance

NONE = "none"

ALWAYS = 0.95  # share of the frames that must show one object
MOSTLY = 0.75  # share of the frames that must agree on a word for it
NAMED = 60.0  # RGB levels between a pixel and a palette entry that may still be called by its name
MIN_VOTES = 0.002  # of the frame's pixels in one palette colour: below, the object is not visible
MIN_ONE = 0.5  # overlap with the best outline: below, the ink is not one compact thing
MIN_OVERLAP = 0.78  # with the outline of the shape named
MIN_LEAD = 0.04  # overlap before the next outline; circle and square of one area overlap by 0.83
MAX_EDGE = 5.0  # pixels from 20 to 80 % coverage; a Gaussian blur of sigma 3
STILL = 0.06  # sides
MAX_STEP = 0.1  # sides from one frame to the next: above, the object jumped
MIN_SPEED = 0.08  # sides per second
MIN_SWELL = 0.4  # of the mean size, from the smallest to the largest
MIN_TURN = 1.0  # radians per second

SYMMETRY = {"square": 4, "triangle": 3}
UNIT_AREA = {"circle": math.pi, "square": 1.76**2, "triangle": 3 * math.sqrt(3) * 0.36}


@dataclass(frozen=True)
class Verdict:
    """A verdict. Every word is the world's or `NONE`."""

    color: str
    shape: str
    motion: str
    background: str
    first: str = NONE  # colour in the first video frame by itself
    overlap: float = 0.0  # soft intersection over union with the best outline, mean over frames
    edge: float = math.inf  # width of the outline, pixels

    def agrees(self, what: Combination) -> dict[str, bool]:
        """For each attribute, whether it is seen as `what` says."""
        return {name: getattr(self, name) == word for name, word in vars(what).items()}


@dataclass(frozen=True)
class Track:
    """The object through time, [T] each; lengths in sides, on the torus until unwrapped."""

    x: Tensor
    y: Tensor
    size: Tensor  # radius of the disc of the same area
    dx: Tensor  # [T, 1, W] offsets of every pixel from the centre
    dy: Tensor  # [T, H, 1]


def judge(video: Tensor) -> Verdict:
    """Uint8 [T, H, W, 3] to what it shows; half a second at least, two to be sure of the motion."""
    pixels = _unshaded(video)
    color, background = _words(pixels)
    start, _ = _words(pixels[:1])
    if NONE in (color, background):
        return Verdict(color, NONE, NONE, background, start)
    cover, ink = _ink(pixels, color)
    track = _track(ink)
    angles = torch.stack([_angle(ink, track, SYMMETRY.get(shape, 0)) for shape in SHAPES])
    overlaps = _overlaps(ink, track, angles)  # [shapes, T]
    best = int(overlaps.mean(1).argmax())
    overlap, edge = float(overlaps[best].mean()), _edge(cover, track)
    if _share(overlaps.amax(0) > MIN_ONE) < ALWAYS:
        return Verdict(color, NONE, NONE, background, start, overlap, edge)
    second, first = overlaps.sort(0).values[-2:]
    plain = (first > MIN_OVERLAP) & (first - second > MIN_LEAD)
    shape = _agreed(overlaps.argmax(0), plain, SHAPES) if edge < MAX_EDGE else NONE
    turning = _unwrap(angles[best], 2 * math.pi / SYMMETRY.get(SHAPES[best], 1))
    motion = _motion(track, turning)
    return Verdict(color, shape, motion, background, start, overlap, edge)


@dataclass(frozen=True)
class VideoMeans:
    """Means over a video."""

    exposure: float  # levels, of all pixels
    area: float  # of the object, in squared sides
    speed: float  # sides per second


def measure(video: Tensor, color: str) -> VideoMeans:
    """Uint8 [T, H, W, 3] with an object of a palette colour; 0 where nothing has it."""
    pixels, exposure = _unshaded(video), float(video.float().mean())
    if not _named(pixels, color).any():
        return VideoMeans(exposure, 0.0, 0.0)
    track = _track(_ink(pixels, color)[1])
    x, y = (_unwrap(path, 1.0) for path in (track.x, track.y))
    pace = torch.hypot(x.diff(), y.diff()).mean() * FPS
    return VideoMeans(exposure, float((math.pi * track.size**2).mean()), float(pace))


def _named(pixels: Tensor, color: str) -> Tensor:
    """[T, H, W, 3] to where a pixel may be called by the colour's name, [T, H, W]."""
    painted = torch.tensor(COLORS[color], dtype=torch.float32)
    return ((pixels - painted) ** 2).sum(-1) < NAMED**2


def _unshaded(video: Tensor) -> Tensor:
    """Uint8 [T, H, W, 3] to levels without the background's vertical shade."""
    height = video.shape[1]
    ramp = SHADE * 127.5 * ((torch.arange(height) + 0.5) / height - 0.5)
    return video.float() - ramp[:, None, None]


def _words(pixels: Tensor) -> tuple[str, str]:
    """[T, H, W, 3] to colour and background, by the votes of the pixels in each frame."""
    palette = torch.tensor([*COLORS.values(), *BACKGROUNDS.values()], dtype=torch.float32)
    flat = pixels.flatten(1, 2).mT  # [T, 3, H*W]
    squares = (palette**2).sum(-1)[:, None] - 2 * palette @ flat  # less the pixel's own
    limit = (NAMED**2 - (flat**2).sum(1, keepdim=True)).minimum(squares.amin(1, keepdim=True))
    share = (squares <= limit).float().mean(2)  # [T, palette]: of the pixels, nearest and near
    objects, grounds = share[:, : len(COLORS)], share[:, len(COLORS) :]
    visible = (objects.amax(1) > MIN_VOTES) & (objects.amax(1) > 0.5 * objects.sum(1))
    seen = _share(visible) >= ALWAYS
    return (
        _agreed(objects.argmax(1), visible, list(COLORS)) if seen else NONE,
        _agreed(grounds.argmax(1), grounds.amax(1) > 0.5, list(BACKGROUNDS)),
    )


def _agreed(choice: Tensor, valid: Tensor, words: Sequence[str]) -> str:
    """The word that most frames [T] choose, and choose validly."""
    word = int(choice.mode().values)
    return words[word] if _share(valid & (choice == word)) > MOSTLY else NONE


def _ink(pixels: Tensor, color: str) -> tuple[Tensor, Tensor]:
    """[T, H, W, 3] to coverage by the object and to ink, all that is not background, [T, H, W]."""
    ground = pixels.flatten(1, 2).median(1).values[:, None, None]  # of each frame
    own = pixels[_named(pixels, color)].median(0).values
    offset, way = pixels - ground, own - ground
    length = way.square().sum(-1)
    cover = (offset * way).sum(-1) / length
    # off the line from background to object: another colour
    stray = (offset - cover[..., None] * way).square().sum(-1).sqrt()
    # steeper about one half: soft edges keep their place, noise and haze below a quarter drop out
    return cover, torch.maximum(2 * cover - 0.5, stray / NAMED - 1).clamp(0, 1)


def _track(ink: Tensor) -> Track:
    """[T, H, W] to centres and sizes: the circular mean, then the mean of the offsets from it."""
    area = ink.mean((1, 2)).clamp_min(1e-6)
    x, dx = _centre(ink.mean(1), area)
    y, dy = _centre(ink.mean(2), area)
    return Track(x, y, (area / math.pi).sqrt(), dx[:, None, :], dy[:, :, None])


def _centre(profile: Tensor, area: Tensor) -> tuple[Tensor, Tensor]:
    """Ink along one axis [T, N] to its centre [T] and the offsets from it [T, N]."""
    grid = (torch.arange(profile.shape[1]) + 0.5) / profile.shape[1]
    turn = torch.polar(profile, 2 * math.pi * grid.expand_as(profile)).sum(1).angle()
    centre = turn / (2 * math.pi)
    centre = centre + (profile * around(grid - centre[:, None])).mean(1) / area
    return centre, around(grid - centre[:, None])


def _angle(ink: Tensor, track: Track, fold: int) -> Tensor:
    """[T, H, W] to the rotation [T] of a shape with `fold` equal corners; 0 for none."""
    if fold == 0:
        return torch.zeros(len(ink))
    z = track.dx + 1j * track.dy
    far = z.abs().clamp_min(1e-6)
    near = ink * (far < 1.7 * track.size[:, None, None])
    moment = (near * far**2 * math.prod([z / far] * fold)).sum((1, 2))
    upright = math.pi if fold == SYMMETRY["square"] else math.pi / 2
    return (moment.angle() - upright) / fold


def _overlaps(ink: Tensor, track: Track, angles: Tensor) -> Tensor:
    """Soft intersection over union [shapes, T] of ink and each outline of its area and angle."""
    side = ink.shape[1]
    out = []
    for index, shape in enumerate(SHAPES):
        cos, sin = angles[index].cos()[:, None, None], angles[index].sin()[:, None, None]
        u, v = cos * track.dx + sin * track.dy, -sin * track.dx + cos * track.dy
        size = track.size * math.sqrt(math.pi / UNIT_AREA[shape])
        outline = distance(u, v, size[:, None, None], torch.tensor(index))
        drawn = (0.5 - outline * side).clamp(0, 1)
        both = torch.minimum(ink, drawn).sum((1, 2))
        out.append(both / torch.maximum(ink, drawn).sum((1, 2)))
    return torch.stack(out)


def _edge(cover: Tensor, track: Track) -> float:
    """Width of the outline, pixels, from the half-covered pixels; the median over frames."""
    near = torch.hypot(track.dx, track.dy) < 1.8 * track.size[:, None, None]
    half = (near & (cover > 0.2) & (cover < 0.8)).sum((1, 2))
    outline = 2 * math.pi * track.size * cover.shape[1]
    return float((half / outline).median())


def _motion(track: Track, turning: Tensor) -> str:
    """The one word of the world that all of place, size and rotation speak for."""
    x, y = _unwrap(track.x, 1.0), _unwrap(track.y, 1.0)
    swell = _range(track.size) / float(track.size.mean())
    turn = float((turning[-1] - turning[0]).abs()) / _seconds(turning)
    jumps = torch.hypot(x.diff(), y.diff()).amax() > MAX_STEP
    if jumps:
        return NONE
    still = _range(x) < STILL and _range(y) < STILL
    if not still:
        return _path(x, y) if swell < MIN_SWELL and turn < MIN_TURN else NONE
    if swell > MIN_SWELL:
        return "pulsing" if _swings(track.size, slowest=1.1) else NONE
    return "spinning" if turn > MIN_TURN else "standing still"


def _path(x: Tensor, y: Tensor) -> str:
    """The word for where an object of one size goes; x, y [T] unwrapped."""
    for along, across, words in (
        (x, y, ("moving left", "moving right")),
        (y, x, ("moving up", "moving down")),
    ):
        way = float(along[-1] - along[0])
        pace = (along[FPS // 2 :] - along[: -(FPS // 2)]) * 2 * math.copysign(1, way)
        if _share(pace > MIN_SPEED) >= ALWAYS and _range(across) < 0.2 * abs(way):
            return words[way > 0]
    if _range(x) < STILL and _range(y) > 0.25 and _swings(y, slowest=0.85):
        return "bouncing"
    return "circling" if _circles(x, y) else NONE


def _swings(values: Tensor, *, slowest: float) -> bool:
    """Whether [T] goes to and fro over its range, from `slowest` to 3 strokes a second."""
    strokes = float(values.diff().abs().sum()) / _range(values)
    return slowest < strokes / _seconds(values) < 3


def _circles(x: Tensor, y: Tensor) -> bool:
    """Whether a path [T] stays on one circle and keeps going round it."""
    # the circle of least squares: x^2 + y^2 = 2 a x + 2 b y + c
    sides = torch.stack([2 * x, 2 * y, torch.ones_like(x)], 1)
    centre = torch.linalg.lstsq(sides, (x**2 + y**2)[:, None]).solution[:2, 0]
    radius = torch.hypot(x - centre[0], y - centre[1])
    turns = _unwrap(torch.atan2(y - centre[1], x - centre[0]), 2 * math.pi)
    rate = float((turns[-1] - turns[0]).abs()) / _seconds(turns) / (2 * math.pi)
    mean = float(radius.mean())
    return 0.12 < mean < 0.4 and _range(radius) < 0.3 * mean and rate > 0.25


def _range(values: Tensor) -> float:
    """From the 5th to the 95th percentile: one ghost of a frame is not a movement."""
    low, high = values.quantile(torch.tensor([0.05, 0.95]))
    return float(high - low)


def _seconds(values: Tensor) -> float:
    return (len(values) - 1) / FPS


def _unwrap(values: Tensor, period: float) -> Tensor:
    """[T] that wraps around at `period` to a path without jumps."""
    steps = around(values.diff() / period) * period
    return torch.cat([values[:1], values[:1] + steps.cumsum(0)])


def _share(frames: Tensor) -> float:
    return float(frames.float().mean())
