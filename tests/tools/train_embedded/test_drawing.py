import random

import numpy as np
import pytest

from tools.train_embedded.captions import BACKGROUNDS, SHAPES, Scene, Thing, parse, random_scene
from tools.train_embedded.data import training_pictures
from tools.train_embedded.detector import detect
from tools.train_embedded.drawing import (
    CANVAS,
    EXTENTS,
    MARGIN,
    MIN_GAP,
    PALETTE,
    Placed,
    crowd,
    draw,
    layout,
    render,
)


def test_same_seed_same_picture() -> None:
    scene = parse("a red star above a blue square")
    first, second, third = (draw(scene, random.Random(seed), loose=True) for seed in (3, 3, 4))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, third)


def test_objects_stay_inside_and_apart() -> None:
    rng = random.Random(0)
    for _ in range(300):
        placed = layout(random_scene(rng), rng)
        for item in placed:
            assert min(item.x, item.y) - item.extent >= MARGIN
            assert max(item.x, item.y) + item.extent <= CANVAS - MARGIN
        if len(placed) == 2:
            first, second = placed
            apart = max(abs(first.x - second.x), abs(first.y - second.y))
            assert apart >= first.extent + second.extent + MIN_GAP


@pytest.mark.parametrize(
    ("relation", "axis", "sign"),
    [("left of", "x", 1), ("right of", "x", -1), ("above", "y", 1), ("below", "y", -1)],
)
def test_relations_hold(relation: str, axis: str, sign: int) -> None:
    scene = Scene(Thing("red", "circle"), relation, Thing("blue", "star"))
    for seed in range(20):
        first, second = layout(scene, random.Random(seed))
        assert sign * (getattr(second, axis) - getattr(first, axis)) > 0


@pytest.mark.parametrize("size", EXTENTS)
def test_sizes_are_drawn_from_their_ranges(size: str | None) -> None:
    low, high = EXTENTS[size]
    for seed in range(20):
        (placed,) = layout(Scene(Thing("red", "circle", size)), random.Random(seed))
        assert low <= placed.extent <= high


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_colours_are_exact_away_from_edges(shape: str, background: str) -> None:
    picture = render([Placed(Thing("purple", shape), 64, 64, 25.0)], background)
    assert picture.shape == (CANVAS, CANVAS, 3)
    assert picture.dtype == np.uint8
    assert tuple(picture[66, 64]) == PALETTE["purple"]
    assert tuple(picture[2, 2]) == PALETTE[background]


def test_edges_are_antialiased() -> None:
    picture = render([Placed(Thing("red", "circle"), 64, 64, 20.0)], "white")
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10


def test_more_pictures_begin_with_the_same_ones() -> None:
    few, captions = training_pictures(3, seed=5)
    more, more_captions = training_pictures(5, seed=5)
    assert few.equal(more[:3])
    assert captions == more_captions[:3]


def test_a_crowd_is_apart_on_the_grid_and_what_the_detector_finds() -> None:
    rng = random.Random(0)
    counts, backgrounds = set(), set()
    for _ in range(40):
        picture = crowd(rng)
        assert picture.shape == (CANVAS, CANVAS, 3)
        assert picture.dtype == np.uint8
        found = detect(picture)
        counts.add(len(found.objects))
        backgrounds.add(found.background)
        for item in found.objects:
            assert item.colour is not None
            assert item.shape is not None
    assert backgrounds == set(BACKGROUNDS)
    assert min(counts) == 1
    assert max(counts) >= 6
    assert np.array_equal(crowd(random.Random(5)), crowd(random.Random(5)))
