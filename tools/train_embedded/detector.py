"""Finds coloured shapes in a picture by classical means, and judges a caption against them.

It knows nothing of the model and takes nothing from the drawing but the meaning of the words:
it separates the background by colour, groups what is left into connected components, takes
each component's colour from its inner pixels and its shape from its geometry (how much of its
box and of its convex hull it fills, where its mass lies, how even its radius is).
"""

from dataclasses import dataclass

import numpy as np

from .captions import COLOURS, Scene, Thing

REFERENCE = {
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
"""What each colour word means: sRGB, 8 bits."""
COLOUR_TOLERANCE = 45.0
"""Largest distance in RGB at which a colour still deserves its name."""
FOREGROUND_DISTANCE = 40.0
"""Distance in RGB from the background at which a pixel belongs to an object."""
SPECK_AREA = 12
"""Components of fewer pixels are dirt: ignored when tiny, never taken for an object."""
DIRT_LIMIT = 24
"""A picture with more dirt than this many pixels in all is rejected."""
MIN_EVENNESS = 0.9
"""Share of an object's inner pixels that must be near its median colour."""
SMALL_BELOW, LARGE_ABOVE = 15.5, 21.0
"""Half the larger side of an object's box in pixels of a 128-pixel picture."""


@dataclass(frozen=True)
class Found:
    """An object in a picture. ``colour`` or ``shape`` is None where no word fits.

    ``x``, ``y``: centre of the box; ``extent``: half its larger side; all in pixels.
    """

    colour: str | None
    shape: str | None
    x: float
    y: float
    width: float
    height: float
    evenness: float

    @property
    def extent(self) -> float:
        """Half the larger side of the box."""
        return max(self.width, self.height) / 2

    @property
    def size(self) -> str | None:
        """One of "small" and "large", or None in between."""
        if self.extent < SMALL_BELOW:
            return "small"
        return "large" if self.extent > LARGE_ABOVE else None


@dataclass(frozen=True)
class Detection:
    """What a picture shows: its background (None where no word fits), objects and dirt pixels."""

    background: str | None
    objects: tuple[Found, ...]
    dirt: int


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows its caption, and if not, every reason why."""

    reasons: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """True where nothing is wrong."""
        return not self.reasons


def _nearest(colour: np.ndarray, names: tuple[str, ...]) -> str | None:
    distances = [float(np.linalg.norm(colour - np.array(REFERENCE[name]))) for name in names]
    best = int(np.argmin(distances))
    return names[best] if distances[best] <= COLOUR_TOLERANCE else None


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """4-connected components of a boolean mask, each as a boolean mask of the same shape."""
    left = mask.copy()
    found = []
    for start in zip(*np.nonzero(mask), strict=True):
        if not left[start]:
            continue
        component = np.zeros_like(mask)
        stack = [start]
        left[start] = False
        while stack:
            y, x = stack.pop()
            component[y, x] = True
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                inside = 0 <= near[0] < mask.shape[0] and 0 <= near[1] < mask.shape[1]
                if inside and left[near]:
                    left[near] = False
                    stack.append(near)
        found.append(component)
    return found


def _grow(mask: np.ndarray) -> np.ndarray:
    """The mask and its 8 neighbours."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    shifts = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return np.logical_or.reduce(shifts)


def _shrink(mask: np.ndarray) -> np.ndarray:
    """The mask without the pixels that touch its outside."""
    return ~_grow(~mask)


def _hull_area(points: np.ndarray) -> float:
    """Area of the convex hull of points (N, 2), by Andrew's monotone chain."""
    ordered = np.unique(points, axis=0)
    chains = []
    for sequence in (ordered, ordered[::-1]):
        chain: list[np.ndarray] = []
        for point in sequence:
            while len(chain) > 1:
                a, b = chain[-1] - chain[-2], point - chain[-1]
                if a[0] * b[1] - a[1] * b[0] > 0:
                    break
                chain.pop()
            chain.append(point)
        chains += chain[:-1]
    x, y = np.array(chains).T
    return 0.5 * abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))))


def _radii(coverage: np.ndarray, x: float, y: float, count: int = 48) -> np.ndarray:
    """Distance from (x, y) to the outline in ``count`` directions, in pixels."""
    angles = np.arange(count) * (2 * np.pi / count)
    reach = np.arange(0.0, max(coverage.shape), 0.25)
    xs = x + np.outer(np.cos(angles), reach)
    ys = y + np.outer(np.sin(angles), reach)
    padded = np.pad(coverage, 1)
    rows = np.clip(np.rint(ys).astype(int) + 1, 0, padded.shape[0] - 1)
    columns = np.clip(np.rint(xs).astype(int) + 1, 0, padded.shape[1] - 1)
    return padded[rows, columns].sum(axis=1) * 0.25


def _classify(coverage: np.ndarray, width: float, height: float) -> str | None:
    """Name the shape whose coverage (H, W), 0 to 1, is given; None where none fits."""
    total = coverage.sum()
    rows, columns = np.indices(coverage.shape)
    y, x = (float((grid * coverage).sum() / total) for grid in (rows, columns))
    if not 0.8 < width / height < 1.3:
        return None
    fill = float(total / (width * height))
    corners = np.argwhere(coverage > 0.5)
    offsets = np.array([(-0.5, -0.5), (-0.5, 0.5), (0.5, -0.5), (0.5, 0.5)])
    hull = _hull_area((corners[:, None] + offsets).reshape(-1, 2))
    solidity = float((coverage > 0.5).sum() / hull)
    radii = _radii(coverage, x, y)
    spread = float(radii.std() / radii.mean())
    top = float(coverage[rows < y].sum() / total)
    return _shape_of(fill, solidity, spread, top, radii)


def _shape_of(fill: float, solidity: float, spread: float, top: float, radii: np.ndarray) -> str | None:
    if fill > 0.93 and solidity > 0.93 and 0.07 < spread < 0.17:
        return "square"
    if 0.72 < fill < 0.86 and solidity > 0.88 and spread < 0.06:
        return "circle"
    if 0.44 < fill < 0.60 and solidity > 0.85 and 0.17 < spread < 0.36 and 0.35 < top < 0.52:
        return "triangle"
    waves = np.abs(np.fft.rfft(radii))[1:]
    if 0.33 < fill < 0.56 and solidity < 0.82 and int(waves.argmax()) + 1 == 5:
        return "star"
    return None


def _measure(picture: np.ndarray, component: np.ndarray, background: np.ndarray) -> Found:
    """Describe one component of a float picture (H, W, 3)."""
    inner = _shrink(component)
    pixels = picture[inner if inner.sum() >= 8 else component]
    colour = np.median(pixels, axis=0)
    even = float((np.linalg.norm(pixels - colour, axis=1) < COLOUR_TOLERANCE / 1.5).mean())
    contrast = colour - background
    along = (picture - background) @ contrast / float(contrast @ contrast)
    coverage = np.where(_grow(component), np.clip(along, 0.0, 1.0), 0.0)
    across, down = coverage.max(axis=0), coverage.max(axis=1)
    spots = np.nonzero(component)
    x, y = ((float(axis.min()) + float(axis.max())) / 2 for axis in (spots[1], spots[0]))
    width, height = float(across.sum()), float(down.sum())
    shape = _classify(coverage, width, height)
    return Found(_nearest(colour, COLOURS), shape, x, y, width, height, even)


def detect(picture: np.ndarray) -> Detection:
    """Find all objects in a picture: uint8 array (H, W, 3), sRGB."""
    values = picture.astype(np.float64)
    border = np.concatenate([values[:3].reshape(-1, 3), values[-3:].reshape(-1, 3)])
    sides = np.concatenate([values[:, :3].reshape(-1, 3), values[:, -3:].reshape(-1, 3)])
    background = np.median(np.concatenate([border, sides]), axis=0)
    mask = np.linalg.norm(values - background, axis=2) > FOREGROUND_DISTANCE
    components = _components(mask)
    objects = [c for c in components if c.sum() > 4 * SPECK_AREA]
    dirt = sum(int(c.sum()) for c in components if c.sum() <= 4 * SPECK_AREA)
    found = tuple(_measure(values, component, background) for component in objects)
    return Detection(_nearest(background, ("white", "black", "gray")), found, dirt)


def _mismatch(thing: Thing, found: Found) -> list[str]:
    """Why ``found`` is not ``thing``."""
    reasons = []
    if found.colour != thing.colour:
        reasons.append(f"{thing}: colour is {found.colour}")
    if found.shape != thing.shape:
        reasons.append(f"{thing}: shape is {found.shape}")
    if thing.size is not None and found.size != thing.size:
        reasons.append(f"{thing}: half extent is {found.extent:.1f} pixels")
    if found.evenness < MIN_EVENNESS:
        reasons.append(f"{thing}: colour is uneven ({found.evenness:.2f})")
    return reasons


def _relation_holds(relation: str, first: Found, second: Found) -> bool:
    """Whether the boxes are apart along the relation's axis and nearly level on the other."""
    right, down = second.x - first.x, second.y - first.y
    along, across = (right, down) if relation in ("left of", "right of") else (down, right)
    if relation in ("right of", "below"):
        along = -along
    horizontal = relation in ("left of", "right of")
    reach = (first.width + second.width) / 2 if horizontal else (first.height + second.height) / 2
    return along > reach and abs(across) < along


def judge(scene: Scene, picture: np.ndarray) -> Verdict:
    """Check a uint8 picture (H, W, 3) against its caption."""
    detection = detect(picture)
    reasons = []
    if detection.background != scene.background_name:
        reasons.append(f"background is {detection.background}, not {scene.background_name}")
    if detection.dirt > DIRT_LIMIT:
        reasons.append(f"{detection.dirt} stray pixels")
    if len(detection.objects) != len(scene.things):
        reasons.append(f"{len(detection.objects)} objects, not {len(scene.things)}")
        return Verdict(tuple(reasons))
    orders = [detection.objects, detection.objects[::-1]][: len(scene.things)]
    options = [_match(scene, order) for order in orders]
    return Verdict(tuple(reasons + min(options, key=len)))


def _match(scene: Scene, objects: tuple[Found, ...]) -> list[str]:
    """What is wrong if ``objects`` are the scene's things in this order."""
    pairs = zip(scene.things, objects, strict=True)
    reasons = [reason for thing, found in pairs for reason in _mismatch(thing, found)]
    if scene.relation is not None and not _relation_holds(scene.relation, *objects):
        reasons.append(f"the first is not {scene.relation} the second")
    return reasons
