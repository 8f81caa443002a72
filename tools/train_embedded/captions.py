"""The caption grammar: scenes as data, their text, and the split into training and held-out ones.

A caption reads ``a [small|large] COLOUR SHAPE [RELATION a [small|large] COLOUR SHAPE]
[on a BACKGROUND background]``.
"""

import hashlib
import random
import re
from dataclasses import dataclass

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple")
SHAPES = ("circle", "square", "triangle", "star")
RELATIONS = ("left of", "right of", "above", "below")
SIZES = ("small", "large")
BACKGROUNDS = ("white", "black", "gray")
DEFAULT_BACKGROUND = "white"
MIRRORED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
HELD_OUT_FRACTION = 5
"""One combination in this many is kept from training."""

_THING = r"an? (?:(?P<size{n}>small|large) )?(?P<colour{n}>{colours}) (?P<shape{n}>{shapes})"
_BACKGROUND = r"(?: on an? (?P<background>{backgrounds}) background)?"


@dataclass(frozen=True)
class Thing:
    """One object; ``size`` is None where the caption names none."""

    colour: str
    shape: str
    size: str | None = None

    def __str__(self) -> str:
        words = " ".join(word for word in (self.size, self.colour, self.shape) if word)
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Scene:
    """One or two objects on a background; ``background`` is None where it is not named."""

    first: Thing
    relation: str | None = None
    second: Thing | None = None
    background: str | None = None

    def __post_init__(self) -> None:
        if (self.relation is None) != (self.second is None):
            raise ValueError(f"a relation needs a second object and the reverse: {self}")

    @property
    def things(self) -> tuple[Thing, ...]:
        """The named objects, in the caption's order."""
        return (self.first,) if self.second is None else (self.first, self.second)

    @property
    def background_name(self) -> str:
        """The background's colour, the default where the caption names none."""
        return self.background or DEFAULT_BACKGROUND

    def __str__(self) -> str:
        text = str(self.first)
        if self.second is not None:
            text += f" {self.relation} {self.second}"
        return f"{text} on a {self.background} background" if self.background else text


def _grammar() -> re.Pattern[str]:
    words = {"colours": "|".join(COLOURS), "shapes": "|".join(SHAPES)}
    first, second = (_THING.format(n=n, **words) for n in (1, 2))
    background = _BACKGROUND.format(backgrounds="|".join(BACKGROUNDS))
    relation = f"(?: (?P<relation>{'|'.join(RELATIONS)}) {second})?"
    return re.compile(first + relation + background)


_CAPTION = _grammar()


def parse(text: str) -> Scene:
    """Read a caption. Raises ``ValueError`` for text outside the grammar."""
    match = _CAPTION.fullmatch(" ".join(text.lower().split()).rstrip("."))
    if match is None:
        raise ValueError(f"not a caption of the grammar: {text!r}")
    first, second = (
        Thing(match[f"colour{n}"], match[f"shape{n}"], match[f"size{n}"]) if match[f"colour{n}"] else None
        for n in (1, 2)
    )
    assert first is not None
    return Scene(first, match["relation"], second, match["background"])


def combination(scene: Scene) -> str | None:
    """The scene's colour-shape-relation combination, the same for both ways of saying it.

    "A left of B" and "B right of A" are one combination. A single object has none.
    """
    if scene.second is None or scene.relation is None:
        return None
    first, second, relation = scene.first, scene.second, scene.relation
    if relation in ("right of", "below"):
        first, second, relation = second, first, MIRRORED[relation]
    return f"{first.colour} {first.shape} {relation} {second.colour} {second.shape}"


def is_held_out(scene: Scene) -> bool:
    """Whether the scene's combination belongs to the fifth that training never sees."""
    key = combination(scene)
    if key is None:
        return False
    digest = hashlib.sha256(f"held out: {key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_FRACTION == 0


def _random_thing(rng: random.Random) -> Thing:
    size = rng.choice((None, *SIZES))
    return Thing(rng.choice(COLOURS), rng.choice(SHAPES), size)


def random_scene(rng: random.Random, pair_share: float = 0.85) -> Scene:
    """Draw any scene of the grammar; the two objects of a pair differ in colour or shape."""
    first = _random_thing(rng)
    background = rng.choice((None, None, *BACKGROUNDS))
    if rng.random() >= pair_share:
        return Scene(first, background=background)
    second = _random_thing(rng)
    while (second.colour, second.shape) == (first.colour, first.shape):
        second = _random_thing(rng)
    return Scene(first, rng.choice(RELATIONS), second, background)


def training_scene(rng: random.Random, pair_share: float = 0.85) -> Scene:
    """Draw a scene that is not held out."""
    while is_held_out(scene := random_scene(rng, pair_share)):
        pass
    return scene


def held_out_scene(rng: random.Random) -> Scene:
    """Draw a pair whose combination training never sees."""
    while not is_held_out(scene := random_scene(rng, pair_share=1.0)):
        pass
    return scene


def held_out_captions(count: int, seed: int = 0) -> list[str]:
    """``count`` different held-out captions, the same for the same seed."""
    rng = random.Random(f"held-out captions {seed}")
    captions: dict[str, None] = {}
    while len(captions) < count:
        captions[str(held_out_scene(rng))] = None
    return list(captions)
