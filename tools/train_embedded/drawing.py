"""Draws a scene: solid shapes with antialiased edges on a plain background."""

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .captions import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing

CANVAS = 128
"""Width and height of a picture in pixels."""
SUPERSAMPLING = 8
MARGIN = 5.0
"""Pixels between any object and the canvas's border, at least."""
MIN_GAP = 9.0
"""Pixels between the two objects of a pair, at least."""

CELL = 8
"""The grid's pitch in a crowd, in pixels: places of a layout on the grid are multiples of it."""
CROWD_MARGIN = 3.0
CROWD_TRIES = 80

PALETTE = {
    "red": (222, 41, 48),
    "green": (45, 160, 75),
    "blue": (38, 92, 214),
    "yellow": (250, 214, 50),
    "orange": (245, 134, 32),
    "purple": (140, 62, 182),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
}
EXTENTS = {"small": (10.5, 13.5), None: (16.5, 19.5), "large": (23.5, 27.0)}
"""Range of half an object's width in pixels, by its named size, in a loose layout."""
GRID_EXTENTS = {"small": 12.0, None: 18.0, "large": 25.0}
"""Half an object's width in pixels, by its named size, in a layout on the grid."""


def _star(points: int = 5, outer: float = 1.05, inner: float = 0.48) -> list[tuple[float, float]]:
    corners = []
    for k in range(2 * points):
        radius = inner if k % 2 else outer
        angle = math.pi * (k / points - 0.5)
        corners.append((radius * math.cos(angle), radius * math.sin(angle) + 0.1))
    return corners


OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0.0, -0.866), (1.0, 0.866), (-1.0, 0.866)],
    "star": _star(),
}
"""Corners in units of the half extent, y pointing down. The circle has none."""


@dataclass(frozen=True)
class Placed:
    """An object with its centre and half extent in pixels."""

    thing: Thing
    x: float
    y: float
    extent: float


def _split_axis(first: float, second: float, rng: random.Random) -> tuple[float, float]:
    """Centres along one axis for half extents ``first`` before ``second``, never touching."""
    free = CANVAS - 2 * MARGIN - 2 * (first + second) - MIN_GAP
    assert free >= 0
    before = free * rng.uniform(0.1, 0.5)
    gap = MIN_GAP + (free - before) * rng.uniform(0.05, 0.6)
    start = MARGIN + before + first
    return start, start + first + gap + second


def _off_axis(extent: float, rng: random.Random, jitter: float) -> float:
    """A centre near the canvas's middle that keeps the object inside."""
    room = CANVAS / 2 - MARGIN - extent
    return CANVAS / 2 + rng.uniform(-1, 1) * min(jitter, room)


def _loose_layout(scene: Scene, rng: random.Random) -> list[Placed]:
    """Places and extents from continuous ranges."""
    extents = [rng.uniform(*EXTENTS[thing.size]) for thing in scene.things]
    if scene.second is None:
        x, y = (_off_axis(extents[0], rng, jitter=16) for _ in range(2))
        return [Placed(scene.first, x, y, extents[0])]
    first, second = extents if scene.relation in ("left of", "above") else extents[::-1]
    return _place_pair(
        scene,
        _split_axis(first, second, rng),
        [_off_axis(e, rng, jitter=6) for e in extents],
        extents,
    )


def _grid_layout(scene: Scene) -> list[Placed]:
    """One place and one extent for everything a caption can say: a quarter, half or three quarters of the way."""
    extents = [GRID_EXTENTS[thing.size] for thing in scene.things]
    middle = CANVAS / 2
    if scene.second is None:
        return [Placed(scene.first, middle, middle, extents[0])]
    return _place_pair(scene, (CANVAS / 4, 3 * CANVAS / 4), [middle, middle], extents)


def _place_pair(scene: Scene, along: tuple[float, float], across: list[float], extents: list[float]) -> list[Placed]:
    """Put a pair at ``along``, from left or top, and ``across``, in the caption's order."""
    horizontal = scene.relation in ("left of", "right of")
    ordered = along if scene.relation in ("left of", "above") else along[::-1]
    return [
        Placed(thing, a if horizontal else b, b if horizontal else a, extent)
        for thing, a, b, extent in zip(scene.things, ordered, across, extents, strict=True)
    ]


def layout(scene: Scene, rng: random.Random, loose: bool = False) -> list[Placed]:
    """Choose places and extents that make the caption true, in the caption's order."""
    return _loose_layout(scene, rng) if loose else _grid_layout(scene)


def render(placed: list[Placed], background: str) -> np.ndarray:
    """Draw objects: uint8 array of shape (CANVAS, CANVAS, 3), sRGB."""
    scale = SUPERSAMPLING
    image = Image.new("RGB", (CANVAS * scale, CANVAS * scale), PALETTE[background])
    pen = ImageDraw.Draw(image)
    for item in placed:
        x, y, extent = item.x * scale, item.y * scale, item.extent * scale
        fill = PALETTE[item.thing.colour]
        if item.thing.shape == "circle":
            pen.ellipse((x - extent, y - extent, x + extent, y + extent), fill=fill)
        else:
            corners = OUTLINES[item.thing.shape]
            pen.polygon([(x + extent * u, y + extent * v) for u, v in corners], fill=fill)
    return np.asarray(image.reduce(scale))


def crowd(rng: random.Random, limit: int = 10) -> np.ndarray:
    """Up to ``limit`` objects anywhere on the grid of 8 pixels: uint8 array of shape (CANVAS, CANVAS, 3), sRGB.

    Not what a caption says, but where the edges are: it has small objects and stars more often
    than captions do, and every background as often as the others.
    """
    placed: list[Placed] = []
    wanted = rng.randint(1, limit)
    for _ in range(CROWD_TRIES):
        shape, size = rng.choice((*SHAPES, "star")), rng.choice((None, "small", "small", "large"))
        thing, extent = Thing(rng.choice(COLOURS), shape, size), GRID_EXTENTS[size]
        x, y = (CELL * rng.randint(1, CANVAS // CELL - 1) for _ in range(2))
        inside = min(x, y, CANVAS - x, CANVAS - y) >= extent + CROWD_MARGIN
        if inside and all(max(abs(x - p.x), abs(y - p.y)) >= extent + p.extent + MARGIN for p in placed):
            placed.append(Placed(thing, x, y, extent))
        if len(placed) == wanted:
            break
    return render(placed, rng.choice(BACKGROUNDS))


def draw(scene: Scene, rng: random.Random, loose: bool = False) -> np.ndarray:
    """A picture that shows the scene: uint8 array of shape (CANVAS, CANVAS, 3), sRGB."""
    return render(layout(scene, rng, loose), scene.background_name)
