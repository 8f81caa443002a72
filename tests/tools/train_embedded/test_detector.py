import random
from dataclasses import replace

import numpy as np
import pytest

from tools.train_embedded.captions import MIRRORED, SHAPES, Scene, Thing, parse, random_scene
from tools.train_embedded.detector import detect, judge
from tools.train_embedded.drawing import Placed, draw, render

SCENE = parse("a large red circle left of a small blue square")


def test_drawn_scenes_are_accepted() -> None:
    rng = random.Random(17)
    scenes = [random_scene(rng) for _ in range(60)]
    refused = [(str(s), v.reasons) for s in scenes if not (v := judge(s, draw(s, rng))).ok]
    assert not refused


def test_slightly_noisy_and_blurred_scenes_are_accepted() -> None:
    rng, noise = random.Random(3), np.random.default_rng(3)
    for _ in range(20):
        scene = random_scene(rng)
        picture = draw(scene, rng).astype(float)
        picture = (2 * picture + np.roll(picture, 1, axis=0) + np.roll(picture, 1, axis=1)) / 4
        picture = np.clip(picture + noise.normal(0, 4, picture.shape), 0, 255).astype(np.uint8)
        assert judge(scene, picture).ok, scene


@pytest.mark.parametrize(
    "caption",
    [
        "a large orange circle left of a small blue square",
        "a large red star left of a small blue square",
        "a large red circle right of a small blue square",
        "a large red circle above a small blue square",
        "a small red circle left of a small blue square",
        "a large red circle left of a large blue square",
        "a large red circle left of a small blue square on a gray background",
        "a large red square left of a small blue circle",
        "a large blue circle left of a small red square",
        "a large red circle",
    ],
)
def test_every_kind_of_mistake_is_rejected(caption: str) -> None:
    for seed in range(3):
        assert not judge(parse(caption), draw(SCENE, random.Random(seed))).ok


def test_a_missing_object_is_rejected() -> None:
    picture = draw(Scene(SCENE.first), random.Random(0))
    assert judge(SCENE, picture).reasons == ("1 objects, not 2",)


def test_random_other_captions_are_rejected() -> None:
    rng = random.Random(23)
    for _ in range(30):
        scene, other = random_scene(rng, pair_share=1.0), random_scene(rng, pair_share=1.0)
        if (scene.first.colour, scene.first.shape) != (other.first.colour, other.first.shape):
            swapped = replace(other, first=other.first)
            assert not judge(swapped, draw(scene, rng)).ok


def test_the_mirrored_relation_is_rejected_and_the_mirrored_caption_accepted() -> None:
    picture = draw(SCENE, random.Random(1))
    assert SCENE.relation is not None
    assert SCENE.second is not None
    assert not judge(replace(SCENE, relation=MIRRORED[SCENE.relation]), picture).ok
    assert judge(Scene(SCENE.second, MIRRORED[SCENE.relation], SCENE.first), picture).ok


@pytest.mark.parametrize("shape", SHAPES)
def test_measures(shape: str) -> None:
    placed = Placed(Thing("green", shape), 70.0, 50.0, 18.0)
    (found,) = detect(render([placed], "black")).objects
    assert (found.colour, found.shape) == ("green", shape)
    assert found.extent == pytest.approx(18.0, abs=2.5)
    assert found.x == pytest.approx(69.5, abs=1.0)
    assert found.y == pytest.approx(49.5, abs=2.0)


def test_dirt_is_rejected() -> None:
    picture = draw(SCENE, random.Random(0)).copy()
    picture[4:9, 4:10] = (40, 160, 70)
    assert judge(SCENE, picture).reasons == ("30 stray pixels",)


def test_an_uneven_object_is_rejected() -> None:
    scene = parse("a large red square")
    picture = render([Placed(scene.first, 64, 64, 25.0)], "white").copy()
    picture[64:80, 50:78] = (222, 120, 120)
    assert any("uneven" in reason for reason in judge(scene, picture).reasons)


def test_a_hole_or_a_bite_spoils_a_shape() -> None:
    scene = parse("a large red square")
    picture = render([Placed(scene.first, 64, 64, 25.0)], "white").copy()
    picture[42:60, 42:60] = 255
    assert not judge(scene, picture).ok


def test_an_empty_picture_has_no_objects() -> None:
    detection = detect(np.full((128, 128, 3), 255, np.uint8))
    assert detection.background == "white"
    assert detection.objects == ()
