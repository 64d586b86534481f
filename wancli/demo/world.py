"""The world the demo model draws: one coloured shape, moving for ever on a plain background.

Anyone can judge from its pixels whether a video shows what its prompt says. Space is a torus: what
leaves at one edge comes back at the other, so every motion goes on without end.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

SIDE = 96  # pixels, both ways
FPS = 16
FRAMES = 33  # video frames of one clip: 9 latent frames

COLORS = {
    "red": (230, 40, 40),
    "green": (40, 190, 70),
    "blue": (50, 90, 235),
    "yellow": (245, 210, 50),
    "purple": (160, 60, 200),
    "orange": (245, 140, 30),
    "white": (245, 245, 245),
    "cyan": (50, 210, 220),
}
BACKGROUNDS = {
    "black": (12, 12, 16),
    "gray": (110, 112, 118),
    "navy": (20, 28, 70),
    "brown": (92, 60, 38),
}
SHAPES = ("circle", "square", "triangle")
MOTIONS = (
    "moving right",
    "moving left",
    "moving up",
    "moving down",
    "bouncing",
    "circling",
    "spinning",
    "pulsing",
    "standing still",
)
DRIFT = {  # direction of a steady motion; y points down
    "moving right": (1, 0),
    "moving left": (-1, 0),
    "moving up": (0, -1),
    "moving down": (0, 1),
}
SHADE = 0.12  # vertical brightness change over the side, in units of [-1, 1]

SYNONYMS = {
    "circle": ("circle", "ball", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "purple": ("purple", "violet"),
    "gray": ("gray", "grey"),
    "moving right": ("moving right", "moving to the right", "sliding right", "going right"),
    "moving left": ("moving left", "moving to the left", "sliding left", "going left"),
    "moving up": ("moving up", "moving upwards", "rising", "going up"),
    "moving down": ("moving down", "moving downwards", "falling", "going down"),
    "bouncing": ("bouncing", "bouncing up and down", "jumping"),
    "circling": ("circling", "orbiting", "moving in a circle", "going round in circles"),
    "spinning": ("spinning", "rotating", "turning around"),
    "pulsing": ("pulsing", "growing and shrinking", "pulsating"),
    "standing still": ("standing still", "not moving", "static", "resting"),
}
TEMPLATES = (
    "a {color} {shape} {motion} on a {background} background",
    "a {color} {shape} is {motion} on a {background} background",
    "a video of a {color} {shape} {motion} on a {background} background",
    "{background} background, a {color} {shape} {motion}",
    "on a {background} background a {color} {shape} is {motion}",
    "the {color} {shape} is {motion} in front of a {background} wall",
    "{color} {shape}, {motion}, {background}",
)
FILLERS = ("a nice video of", "cinematic shot,", "best quality", "beautiful", "simple", "4k")


@dataclass(frozen=True)
class Combination:
    """The attributes that a prompt names."""

    color: str
    shape: str
    motion: str
    background: str

    @property
    def prompt(self) -> str:
        """The plain wording."""
        return TEMPLATES[0].format(**vars(self))


@dataclass(frozen=True)
class Scene:
    """A combination and what its prompt leaves open. Lengths are shares of the side."""

    what: Combination
    radius: float
    x: float
    y: float
    speed: float  # sides per second
    phase: float  # turns


def combinations(*, held_out: bool) -> list[Combination]:
    """Every combination that is (not) kept from training: a quarter is, as in a Latin square.

    Each (color, shape, motion) is trained on three backgrounds and tested on the fourth.
    """
    axes = (list(COLORS), SHAPES, MOTIONS, list(BACKGROUNDS))
    out = []
    for indices in product(*(range(len(axis)) for axis in axes)):
        what = Combination(*(axis[i] for axis, i in zip(axes, indices, strict=True)))
        if what.shape == "circle" and what.motion == "spinning":
            continue  # nobody could see it
        if (sum(indices) % 4 == 0) == held_out:
            out.append(what)
    return out


def sample_scene(
    rng: random.Random, choices: Sequence[Combination], motions: Sequence[str] = MOTIONS
) -> Scene:
    """Draw a scene; motions are balanced first, then the rest."""
    motion = rng.choice(motions)
    what = rng.choice([c for c in choices if c.motion == motion])
    across, along = rng.uniform(0.25, 0.75), rng.random()
    dx, dy = DRIFT.get(motion, (0, 0))
    x, y = (along if dx else across), (along if dy else rng.uniform(0.25, 0.75))
    return Scene(what, rng.uniform(0.19, 0.26), x, y, rng.uniform(0.18, 0.3), rng.random())


def describe(what: Combination, rng: random.Random) -> str:
    """A prompt for a combination in training: other words, other orders, words left out."""
    draw = rng.random()
    if draw < 0.1:
        return ""
    if draw < 0.5:
        return what.prompt
    words = {name: rng.choice(SYNONYMS.get(word, (word,))) for name, word in vars(what).items()}
    if draw < 0.6:
        return "a {color} {shape} {motion}".format(**words)
    if draw < 0.65:
        return "a {color} {shape}".format(**words)
    if draw < 0.7:
        return "a {shape} {motion}".format(**words)
    text = rng.choice(TEMPLATES).format(**words)
    if draw > 0.92:
        text = f"{rng.choice(FILLERS)} {text}"
    return text


def render(scenes: Sequence[Scene], *, first: int = 0, frames: int = FRAMES) -> Tensor:
    """[B, 3, frames, SIDE, SIDE] in [-1, 1], from video frame `first` on; anti-aliased."""
    t = (torch.arange(first, first + frames) / FPS)[None]  # [1, F]
    x, y, size, angle = _poses(scenes, t)
    grid = (torch.arange(SIDE) + 0.5) / SIDE
    dx = _around(grid[None, None, None, :] - x[..., None, None])  # [B, F, 1, W]
    dy = _around(grid[None, None, :, None] - y[..., None, None])  # [B, F, H, 1]
    cos, sin = torch.cos(angle)[..., None, None], torch.sin(angle)[..., None, None]
    u, v = cos * dx + sin * dy, -sin * dx + cos * dy
    shapes = torch.tensor([SHAPES.index(s.what.shape) for s in scenes])[:, None, None, None]
    distance = _distance(u, v, size[..., None, None], shapes)
    alpha = (0.5 - distance * SIDE).clamp(0, 1)[:, None]  # [B, 1, F, H, W]
    color = _paint([COLORS[s.what.color] for s in scenes])
    ground = _paint([BACKGROUNDS[s.what.background] for s in scenes])
    ground = ground + SHADE * (grid - 0.5)[:, None]
    shaded = color - SHADE * dy[:, None]
    return (ground * (1 - alpha) + shaded * alpha).clamp(-1, 1)


def _poses(scenes: Sequence[Scene], t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre x, y, radius and angle of each scene, each [B, F]."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values)[:, None]

    def does(motion: str) -> Tensor:
        return column([float(s.what.motion == motion) for s in scenes])

    turns = column([s.phase for s in scenes])
    radius = column([s.radius for s in scenes]).expand(-1, t.shape[1])
    way = [DRIFT.get(s.what.motion, (0, 0)) for s in scenes]
    x = (
        column([s.x for s in scenes])
        + column([w[0] * s.speed for w, s in zip(way, scenes, strict=True)]) * t
    )
    y = (
        column([s.y for s in scenes])
        + column([w[1] * s.speed for w, s in zip(way, scenes, strict=True)]) * t
    )
    hop = 0.7 - 0.38 * torch.sin(math.pi * (0.55 * t + turns)).abs()
    y = torch.lerp(y, hop, does("bouncing"))
    orbit = 2 * math.pi * (turns + 0.36 * t)
    x = torch.lerp(x, 0.5 + 0.21 * torch.cos(orbit), does("circling"))
    y = torch.lerp(y, 0.5 + 0.21 * torch.sin(orbit), does("circling"))
    size = radius * (1 + 0.35 * torch.sin(2 * math.pi * (turns + 0.75 * t)) * does("pulsing"))
    return x, y, size, does("spinning") * (2 * math.pi * turns + 1.6 * t)


def _around(offset: Tensor) -> Tensor:
    """Shortest offset on the torus, in [-0.5, 0.5)."""
    return (offset + 0.5) % 1 - 0.5


def _distance(u: Tensor, v: Tensor, size: Tensor, shapes: Tensor) -> Tensor:
    """Signed distance to the outline (negative inside), in sides."""
    circle = torch.sqrt(u * u + v * v) - size
    square = torch.maximum(u.abs(), v.abs()) - size * 0.88
    slope = torch.maximum(0.866 * u - 0.5 * v, -0.866 * u - 0.5 * v)
    triangle = torch.maximum(v, slope) - size * 0.6
    return torch.where(shapes == 0, circle, torch.where(shapes == 1, square, triangle))


def _paint(colors: Sequence[tuple[int, int, int]]) -> Tensor:
    return (torch.tensor(colors, dtype=torch.float32) / 127.5 - 1)[:, :, None, None, None]
