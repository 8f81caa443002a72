"""Judging pictures in bulk and reporting it."""

from __future__ import annotations

import random

from tools.train_embedded.captions import held_out_captions, parse
from tools.train_embedded.drawing import draw
from tools.train_embedded.evaluate import assess, card

CAPTIONS = held_out_captions(6, seed=3)


def test_drawings_pass_and_swapped_ones_do_not() -> None:
    pictures = [draw(parse(caption), random.Random(0)) for caption in CAPTIONS]
    assert assess(CAPTIONS, pictures)["passed"] == 6
    result = assess(CAPTIONS, [*pictures[:4], pictures[5], pictures[4]])
    assert result["passed"] == 4
    assert [failure["index"] for failure in result["failures"]] == [4, 5]
    assert all(failure["reasons"] for failure in result["failures"])


def test_the_card_holds_the_figures_and_no_placeholder() -> None:
    result = {"num_inference_steps": 20, "guidance_scale": 0.0, "passed": 197, "captions": 200, "score": 0.985}
    text = card(result)
    assert "197 of 200 held-out captions (98.5%)" in text
    assert "num_inference_steps=20" in text
    assert not any(f"{{{name}}}" in text for name in ("steps", "guidance", "passed", "captions", "score"))
