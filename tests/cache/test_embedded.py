"""Caches on the embedded model, with and without quantization."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lowbit import Omni
from lowbit.errors import ConfigError
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


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_cache_dit_skips_and_starts_clean(quantization: str | None) -> None:
    pytest.importorskip("cache_dit", reason="needs cache-dit")
    options = {"Fn_compute_blocks": 1, "max_warmup_steps": 4, "residual_diff_threshold": 0.12}
    exact, _ = pictures(quantization=quantization)
    omni = Omni(device="cpu", quantization=quantization, cache_backend="cache_dit", cache_config=options)
    first, again = (omni.generate(PROMPTS[0], OmniDiffusionSamplingParams(seed=3), progress=False)[0] for _ in range(2))
    assert first.skipped_steps == again.skipped_steps
    assert first.skipped_steps
    assert np.array_equal(np.asarray(first.images[0]), np.asarray(again.images[0]))
    assert picture_metrics(exact[0], np.asarray(first.images[0]))["psnr_db"] >= 25


def test_options_that_do_not_fit_the_model_are_told() -> None:
    pytest.importorskip("cache_dit", reason="needs cache-dit")
    omni = Omni(device="cpu", cache_backend="cache_dit", cache_config={"Fn_compute_blocks": 8})
    with pytest.raises(ConfigError, match="does not take these options .*Fn_compute_blocks 8"):
        omni.generate(PROMPTS[0], progress=False)
