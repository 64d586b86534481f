"""Classify the content of a video from its pixels alone, to evaluate the demo model.

The judge knows the world's palette and outlines, but not the prompt. Every attribute can be `NONE`:
always choosing the nearest word would accept blobs. The thresholds lie between the values of clean
renders (overlap 0.97, lead 0.13, edge 1 pixel) and of blobs; see its tests.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wancli.demo.world import (
    BACKGROUNDS,
    COLORS,
    FPS,
    SHADE,
    SHAPES,
    Combination,
    signed_distance,
    wrap_offset,
)

NONE = "none"

# Lengths are in sides of the frame.
ALWAYS = 0.95  # fraction of the frames that must show one object
MOSTLY = 0.75  # fraction of the frames that must agree on a word
COLOR_RADIUS = 60.0  # maximum RGB distance of a pixel from its palette color
MIN_VOTES = 0.002  # fraction of the pixels in one color: below, the object is not visible
MIN_COMPACT = 0.5  # overlap with the best outline: below, the ink is not one compact object
MIN_OVERLAP = 0.78  # with the outline of the shape
MIN_LEAD = 0.04  # of overlap over the next outline; circle and square of one area overlap by 0.83
MAX_EDGE = 5.0  # pixels from 20 to 80 % coverage; a Gaussian blur of sigma 3
STILL = 0.06
MAX_STEP = 0.1  # per frame: above, the object jumped
MIN_SPEED = 0.08  # per second
MIN_SWELL = 0.4  # range of sizes, relative to their mean
MIN_TURN = 1.0  # radians per second

SYMMETRY = {"square": 4, "triangle": 3}
UNIT_AREA = {"circle": math.pi, "square": 1.76**2, "triangle": 3 * math.sqrt(3) * 0.36}


@dataclass(frozen=True)
class Verdict:
    """The attributes of a video: words of the world, or `NONE`."""

    color: str
    shape: str
    motion: str
    background: str
    first: str = NONE  # color in the first video frame alone
    overlap: float = 0.0  # soft intersection over union with the best outline, mean over frames
    edge: float = math.inf  # width of the outline, pixels

    def agrees(self, combination: Combination) -> dict[str, bool]:
        """Whether each attribute matches the combination."""
        return {name: getattr(self, name) == word for name, word in vars(combination).items()}


@dataclass(frozen=True)
class Track:
    """The object's path, [T] each, in sides; positions wrap around the torus."""

    x: Tensor
    y: Tensor
    size: Tensor  # radius of the disc of the same area
    dx: Tensor  # [T, 1, W] offsets of every pixel from the center
    dy: Tensor  # [T, H, 1]


def judge(video: Tensor) -> Verdict:
    """Judge uint8 [T, H, W, 3]: at least half a second, two for a reliable motion."""
    pixels = _unshaded(video)
    color, background = _colors(pixels)
    start, _ = _colors(pixels[:1])
    if NONE in (color, background):
        return Verdict(color, NONE, NONE, background, start)
    cover, ink = _ink(pixels, color)
    track = _track(ink)
    angles = torch.stack([_angle(ink, track, SYMMETRY.get(shape, 0)) for shape in SHAPES])
    overlaps = _overlaps(ink, track, angles)  # [shapes, T]
    best = int(overlaps.mean(1).argmax())
    overlap, edge = float(overlaps[best].mean()), _edge(cover, track)
    if _share(overlaps.amax(0) > MIN_COMPACT) < ALWAYS:
        return Verdict(color, NONE, NONE, background, start, overlap, edge)
    second, first = overlaps.sort(0).values[-2:]
    plain = (first > MIN_OVERLAP) & (first - second > MIN_LEAD)
    shape = _majority(overlaps.argmax(0), plain, SHAPES) if edge < MAX_EDGE else NONE
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
    """Measure uint8 [T, H, W, 3] with an object of a palette color; 0 without one."""
    pixels, exposure = _unshaded(video), float(video.float().mean())
    if not _has_color(pixels, color).any():
        return VideoMeans(exposure, 0.0, 0.0)
    track = _track(_ink(pixels, color)[1])
    x, y = (_unwrap(path, 1.0) for path in (track.x, track.y))
    speed = torch.hypot(x.diff(), y.diff()).mean() * FPS
    return VideoMeans(exposure, float((math.pi * track.size**2).mean()), float(speed))


def _has_color(pixels: Tensor, color: str) -> Tensor:
    """Mask [T, H, W] of the pixels [T, H, W, 3] near a palette color."""
    palette_color = torch.tensor(COLORS[color], dtype=torch.float32)
    return ((pixels - palette_color) ** 2).sum(-1) < COLOR_RADIUS**2


def _unshaded(video: Tensor) -> Tensor:
    """Remove the background's vertical shading from uint8 [T, H, W, 3]."""
    height = video.shape[1]
    ramp = SHADE * 127.5 * ((torch.arange(height) + 0.5) / height - 0.5)
    return video.float() - ramp[:, None, None]


def _colors(pixels: Tensor) -> tuple[str, str]:
    """Color and background of [T, H, W, 3], by a vote of the pixels in each frame."""
    palette = torch.tensor([*COLORS.values(), *BACKGROUNDS.values()], dtype=torch.float32)
    planes = pixels.permute(3, 0, 1, 2).flatten(2)  # [3, T, H*W]
    own = (palette**2).sum(1, keepdim=True)
    squares = torch.addmm(own, palette, planes.flatten(1), alpha=-2)  # without the pixel's own
    squares = squares.view(-1, *planes.shape[1:])  # [palette, T, H*W]
    limit = (COLOR_RADIUS**2 - (planes**2).sum(0)).minimum(squares.amin(0))
    share = (squares <= limit).sum(2, dtype=torch.int32).T / planes.shape[2]  # [T, palette]
    objects, grounds = share[:, : len(COLORS)], share[:, len(COLORS) :]
    visible = (objects.amax(1) > MIN_VOTES) & (objects.amax(1) > 0.5 * objects.sum(1))
    is_visible = _share(visible) >= ALWAYS
    return (
        _majority(objects.argmax(1), visible, list(COLORS)) if is_visible else NONE,
        _majority(grounds.argmax(1), grounds.amax(1) > 0.5, list(BACKGROUNDS)),
    )


def _majority(choice: Tensor, valid: Tensor, words: Sequence[str]) -> str:
    """The word that most frames [T] choose with a valid choice."""
    word = int(choice.mode().values)
    return words[word] if _share(valid & (choice == word)) > MOSTLY else NONE


def _ink(pixels: Tensor, color: str) -> tuple[Tensor, Tensor]:
    """Coverage [T, H, W] by the object, and ink [T, H, W]: everything but background."""
    ground = pixels.flatten(1, 2).median(1).values[:, None, None]  # of each frame
    own = pixels[_has_color(pixels, color)].median(0).values
    offset, axis = pixels - ground, own - ground
    length = axis.square().sum(-1)
    cover = (offset * axis).sum(-1) / length
    # Distance from the line between background and object: another color.
    stray = (offset - cover[..., None] * axis).square().sum(-1).sqrt()
    # Steeper around one half: edges stay in place, noise and haze below a quarter vanish.
    return cover, torch.maximum(2 * cover - 0.5, stray / COLOR_RADIUS - 1).clamp(0, 1)


def _track(ink: Tensor) -> Track:
    """Track ink [T, H, W]: the circular mean, refined by the mean offset from it."""
    area = ink.mean((1, 2)).clamp_min(1e-6)
    x, dx = _center(ink.mean(1), area)
    y, dy = _center(ink.mean(2), area)
    return Track(x, y, (area / math.pi).sqrt(), dx[:, None, :], dy[:, :, None])


def _center(profile: Tensor, area: Tensor) -> tuple[Tensor, Tensor]:
    """Center [T] of ink along one axis [T, N], and offsets [T, N] from it."""
    grid = (torch.arange(profile.shape[1]) + 0.5) / profile.shape[1]
    turn = torch.polar(profile, 2 * math.pi * grid.expand_as(profile)).sum(1).angle()
    center = turn / (2 * math.pi)
    center = center + (profile * wrap_offset(grid - center[:, None])).mean(1) / area
    return center, wrap_offset(grid - center[:, None])


def _angle(ink: Tensor, track: Track, fold: int) -> Tensor:
    """Rotation [T] of a shape with `fold` equal corners from ink [T, H, W]; 0 for a circle."""
    if fold == 0:
        return torch.zeros(len(ink))
    z = track.dx + 1j * track.dy
    far = z.abs().clamp_min(1e-6)
    near = ink * (far < 1.7 * track.size[:, None, None])
    moment = (near * far**2 * math.prod([z / far] * fold)).sum((1, 2))
    upright = math.pi if fold == SYMMETRY["square"] else math.pi / 2
    return (moment.angle() - upright) / fold


def _overlaps(ink: Tensor, track: Track, angles: Tensor) -> Tensor:
    """Soft IoU [shapes, T] of ink with each shape of the same area, at its angle."""
    side = ink.shape[1]
    out = []
    for index, shape in enumerate(SHAPES):
        cos, sin = angles[index].cos()[:, None, None], angles[index].sin()[:, None, None]
        u, v = cos * track.dx + sin * track.dy, -sin * track.dx + cos * track.dy
        size = track.size * math.sqrt(math.pi / UNIT_AREA[shape])
        outline = signed_distance(u, v, size[:, None, None], torch.tensor(index))
        drawn = (0.5 - outline * side).clamp(0, 1)
        common = torch.minimum(ink, drawn).sum((1, 2))
        out.append(common / torch.maximum(ink, drawn).sum((1, 2)))
    return torch.stack(out)


def _edge(cover: Tensor, track: Track) -> float:
    """Width of the outline in pixels, from the half-covered pixels; median over frames."""
    near = torch.hypot(track.dx, track.dy) < 1.8 * track.size[:, None, None]
    half = (near & (cover > 0.2) & (cover < 0.8)).sum((1, 2))
    outline = 2 * math.pi * track.size * cover.shape[1]
    return float((half / outline).median())


def _motion(track: Track, turning: Tensor) -> str:
    """The motion that position, size and rotation all agree on."""
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
        return "pulsing" if _oscillates(track.size, slowest=1.1) else NONE
    return "spinning" if turn > MIN_TURN else "standing still"


def _path(x: Tensor, y: Tensor) -> str:
    """Motion of an object of constant size along unwrapped x, y [T]."""
    for along, across, words in (
        (x, y, ("moving left", "moving right")),
        (y, x, ("moving up", "moving down")),
    ):
        distance = float(along[-1] - along[0])
        speed = (along[FPS // 2 :] - along[: -(FPS // 2)]) * 2 * math.copysign(1, distance)
        if _share(speed > MIN_SPEED) >= ALWAYS and _range(across) < 0.2 * abs(distance):
            return words[distance > 0]
    if _range(x) < STILL and _range(y) > 0.25 and _oscillates(y, slowest=0.85):
        return "bouncing"
    return "circling" if _circles(x, y) else NONE


def _oscillates(values: Tensor, *, slowest: float) -> bool:
    """Whether [T] moves back and forth over its range, `slowest` to 3 strokes per second."""
    strokes = float(values.diff().abs().sum()) / _range(values)
    return slowest < strokes / _seconds(values) < 3


def _circles(x: Tensor, y: Tensor) -> bool:
    """Whether a path [T] stays on one circle and keeps going around it."""
    # Least squares: x^2 + y^2 = 2 a x + 2 b y + c
    sides = torch.stack([2 * x, 2 * y, torch.ones_like(x)], 1)
    center = torch.linalg.lstsq(sides, (x**2 + y**2)[:, None]).solution[:2, 0]
    radius = torch.hypot(x - center[0], y - center[1])
    turns = _unwrap(torch.atan2(y - center[1], x - center[0]), 2 * math.pi)
    rate = float((turns[-1] - turns[0]).abs()) / _seconds(turns) / (2 * math.pi)
    mean = float(radius.mean())
    return 0.12 < mean < 0.4 and _range(radius) < 0.3 * mean and rate > 0.25


def _range(values: Tensor) -> float:
    """5th to 95th percentile, so that an outlier frame is not a movement."""
    low, high = values.quantile(torch.tensor([0.05, 0.95]))
    return float(high - low)


def _seconds(values: Tensor) -> float:
    return (len(values) - 1) / FPS


def _unwrap(values: Tensor, period: float) -> Tensor:
    """Unwrap [T] with a period, to a path without jumps."""
    steps = wrap_offset(values.diff() / period) * period
    return torch.cat([values[:1], values[:1] + steps.cumsum(0)])


def _share(frames: Tensor) -> float:
    return float(frames.float().mean())
