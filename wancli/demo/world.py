"""The world of the demo model: one colored shape that moves on a plain background.

Pixels alone decide whether a video matches its prompt. Space is a torus: an object that leaves at
one edge comes back at the other, so every motion can continue.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

SIDE = 96  # pixels, width and height
FPS = 16
FRAMES = 33  # video frames of a clip: 9 latent frames

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
DIRECTIONS = {  # of linear motion; y points down
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
        """The prompt in its plainest wording."""
        return TEMPLATES[0].format(**vars(self))


@dataclass(frozen=True)
class Scene:
    """A combination, and the values its prompt leaves open. Lengths are in sides."""

    combination: Combination
    radius: float
    x: float
    y: float
    speed: float  # sides per second
    phase: float  # turns


def combinations(*, held_out: bool) -> list[Combination]:
    """Combinations held out from training, or the others: a quarter, as in a Latin square.

    Each (color, shape, motion) is trained on three backgrounds and tested on the fourth.
    """
    axes = (list(COLORS), SHAPES, MOTIONS, list(BACKGROUNDS))
    out = []
    for indices in product(*(range(len(axis)) for axis in axes)):
        combination = Combination(*(axis[i] for axis, i in zip(axes, indices, strict=True)))
        if combination.shape == "circle" and combination.motion == "spinning":
            continue  # invisible
        if (sum(indices) % 4 == 0) == held_out:
            out.append(combination)
    return out


def sample_scene(
    rng: random.Random, choices: Sequence[Combination], motions: Sequence[str] = MOTIONS
) -> Scene:
    """Draw a scene, balanced by motion."""
    motion = rng.choice(motions)
    combination = rng.choice([c for c in choices if c.motion == motion])
    across, along = rng.uniform(0.25, 0.75), rng.random()
    dx, dy = DIRECTIONS.get(motion, (0, 0))
    x, y = (along if dx else across), (along if dy else rng.uniform(0.25, 0.75))
    return Scene(combination, rng.uniform(0.19, 0.26), x, y, rng.uniform(0.18, 0.3), rng.random())


def describe(combination: Combination, rng: random.Random) -> str:
    """Draw a training prompt: with synonyms, other orders and omitted words."""
    draw = rng.random()
    if draw < 0.1:
        return ""
    if draw < 0.5:
        return combination.prompt
    words = {
        name: rng.choice(SYNONYMS.get(word, (word,))) for name, word in vars(combination).items()
    }
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
    """Render [B, 3, frames, SIDE, SIDE] in [-1, 1] from video frame `first`, anti-aliased."""
    t = (torch.arange(first, first + frames) / FPS)[None]  # [1, F]
    x, y, size, angle = _poses(scenes, t)
    grid = (torch.arange(SIDE) + 0.5) / SIDE
    dx = wrap_offset(grid[None, None, None, :] - x[..., None, None])  # [B, F, 1, W]
    dy = wrap_offset(grid[None, None, :, None] - y[..., None, None])  # [B, F, H, 1]
    cos, sin = torch.cos(angle)[..., None, None], torch.sin(angle)[..., None, None]
    u, v = cos * dx + sin * dy, -sin * dx + cos * dy
    shapes = torch.tensor([SHAPES.index(s.combination.shape) for s in scenes])[:, None, None, None]
    distance = signed_distance(u, v, size[..., None, None], shapes)
    alpha = (0.5 - distance * SIDE).clamp(0, 1)[:, None]  # [B, 1, F, H, W]
    color = _paint([COLORS[s.combination.color] for s in scenes])
    ground = _paint([BACKGROUNDS[s.combination.background] for s in scenes])
    ground = ground + SHADE * (grid - 0.5)[:, None]
    shaded = color - SHADE * dy[:, None]
    return (ground * (1 - alpha) + shaded * alpha).clamp(-1, 1)


def _poses(scenes: Sequence[Scene], t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Center x, y, radius and angle of each scene, [B, F] each."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values)[:, None]

    def moves(motion: str) -> Tensor:
        return column([float(s.combination.motion == motion) for s in scenes])

    turns = column([s.phase for s in scenes])
    radius = column([s.radius for s in scenes]).expand(-1, t.shape[1])
    directions = [DIRECTIONS.get(s.combination.motion, (0, 0)) for s in scenes]
    x = (
        column([s.x for s in scenes])
        + column([d[0] * s.speed for d, s in zip(directions, scenes, strict=True)]) * t
    )
    y = (
        column([s.y for s in scenes])
        + column([d[1] * s.speed for d, s in zip(directions, scenes, strict=True)]) * t
    )
    hop = 0.7 - 0.38 * torch.sin(math.pi * (0.55 * t + turns)).abs()
    y = torch.lerp(y, hop, moves("bouncing"))
    orbit = 2 * math.pi * (turns + 0.36 * t)
    x = torch.lerp(x, 0.5 + 0.21 * torch.cos(orbit), moves("circling"))
    y = torch.lerp(y, 0.5 + 0.21 * torch.sin(orbit), moves("circling"))
    size = radius * (1 + 0.35 * torch.sin(2 * math.pi * (turns + 0.75 * t)) * moves("pulsing"))
    return x, y, size, moves("spinning") * (2 * math.pi * turns + 1.6 * t)


def wrap_offset(offset: Tensor) -> Tensor:
    """Shortest offset on the torus, in [-0.5, 0.5)."""
    return (offset + 0.5) % 1 - 0.5


def signed_distance(u: Tensor, v: Tensor, size: Tensor, shapes: Tensor) -> Tensor:
    """Signed distance to the outline in sides, negative inside."""
    circle = torch.sqrt(u * u + v * v) - size
    square = torch.maximum(u.abs(), v.abs()) - size * 0.88
    slope = torch.maximum(0.866 * u - 0.5 * v, -0.866 * u - 0.5 * v)
    triangle = torch.maximum(v, slope) - size * 0.6
    return torch.where(shapes == 0, circle, torch.where(shapes == 1, square, triangle))


def _paint(colors: Sequence[tuple[int, int, int]]) -> Tensor:
    return (torch.tensor(colors, dtype=torch.float32) / 127.5 - 1)[:, :, None, None, None]
