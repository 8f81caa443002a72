import random

import pytest

from tools.train_embedded.captions import (
    COLOURS,
    MIRRORED,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    held_out_captions,
    held_out_scene,
    is_held_out,
    parse,
    random_scene,
    training_scene,
)

README_CAPTION = "a large red circle left of a small blue square"


def all_pairs() -> list[Scene]:
    things = [Thing(colour, shape) for colour in COLOURS for shape in SHAPES]
    return [
        Scene(first, relation, second)
        for first in things
        for second in things
        if first != second
        for relation in RELATIONS
    ]


def test_captions_read_back_as_their_scenes() -> None:
    rng = random.Random(0)
    for _ in range(500):
        scene = random_scene(rng)
        assert parse(str(scene)) == scene


def test_the_first_command_of_the_readme() -> None:
    expected = Scene(Thing("red", "circle", "large"), "left of", Thing("blue", "square", "small"))
    assert parse(README_CAPTION) == expected
    assert expected.background_name == "white"


@pytest.mark.parametrize(
    ("text", "same_as"),
    [
        ("An orange circle", "an orange circle"),
        ("a orange circle.", "an orange circle"),
        (
            "a small orange  circle on a Gray background",
            "a small orange circle on a gray background",
        ),
    ],
)
def test_case_blanks_and_articles_do_not_matter(text: str, same_as: str) -> None:
    assert str(parse(text)) == same_as


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a pink circle",
        "red circle",
        "a red circle beside a blue square",
        "a red circle left of",
    ],
)
def test_other_text_is_rejected_with_its_words(text: str) -> None:
    with pytest.raises(ValueError, match="not a caption"):
        parse(text)


def test_a_relation_needs_two_objects() -> None:
    with pytest.raises(ValueError, match="relation"):
        Scene(Thing("red", "circle"), "above")


def test_a_fifth_of_the_combinations_is_held_out() -> None:
    pairs = all_pairs()
    share = sum(map(is_held_out, pairs)) / len(pairs)
    assert 0.18 < share < 0.22


def test_every_colour_shape_and_relation_remains_in_training() -> None:
    seen = {word for s in all_pairs() if not is_held_out(s) for word in (str(s.first), s.relation)}
    assert len(seen) == len(COLOURS) * len(SHAPES) + len(RELATIONS)


def test_the_mirrored_caption_is_held_out_too() -> None:
    for scene in all_pairs():
        assert scene.second is not None
        assert scene.relation is not None
        mirrored = Scene(scene.second, MIRRORED[scene.relation], scene.first)
        assert is_held_out(mirrored) == is_held_out(scene)


def test_sizes_and_background_do_not_move_a_scene_between_the_splits() -> None:
    scene = held_out_scene(random.Random(1))
    assert scene.second is not None
    plain = Scene(
        Thing(scene.first.colour, scene.first.shape),
        scene.relation,
        Thing(scene.second.colour, scene.second.shape, "large"),
        "black",
    )
    assert is_held_out(plain)


def test_training_never_sees_a_held_out_scene() -> None:
    rng = random.Random(2)
    assert not any(is_held_out(training_scene(rng)) for _ in range(1000))


def test_held_out_captions_are_different_and_repeatable() -> None:
    captions = held_out_captions(200)
    assert len(set(captions)) == 200
    assert captions == held_out_captions(200)
    assert captions != held_out_captions(200, seed=1)
    assert all(is_held_out(parse(caption)) for caption in captions)
