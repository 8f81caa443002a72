"""TeaCache on the embedded model, with and without quantization."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lowbit import Omni
from lowbit.evaluation.metrics import picture_metrics
from lowbit.inputs.data import OmniDiffusionSamplingParams

PROMPTS = ("a large red circle left of a small blue square", "a small yellow star on a black background")


def pictures(**options: Any) -> tuple[list[np.ndarray], list[int]]:
    omni = Omni(device="cpu", **options)
    outputs = [omni.generate(prompt, OmniDiffusionSamplingParams(seed=3), progress=False) for prompt in PROMPTS]
    images = [np.asarray(output.images[0]) for output in outputs if not isinstance(output, list)]
    return images, [len(output.skipped_steps) for output in outputs if not isinstance(output, list)]


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_the_default_skips_a_quarter_and_keeps_the_picture(quantization: str | None) -> None:
    exact, none = pictures(quantization=quantization)
    cached, skipped = pictures(quantization=quantization, cache_backend="tea_cache")
    assert none == [0, 0]
    assert min(skipped) >= 5  # of 20
    for first, second in zip(exact, cached, strict=True):
        assert picture_metrics(first, second)["psnr_db"] >= 25


def test_guidance_in_one_batch_skips_too() -> None:
    omni = Omni(device="cpu", cache_backend="tea_cache")
    output = omni.generate(
        PROMPTS[0], OmniDiffusionSamplingParams(seed=3, guidance_scale=1.5, num_inference_steps=8), progress=False
    )
    assert not isinstance(output, list)
    assert output.metrics["num_skipped_steps"] == len(output.skipped_steps)
