import math

import flip_evaluator
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from lowbit.errors import ConfigError
from lowbit.evaluation.perceptual import flip, flip_map, lpips_absence, lpips_distance, perceptual_metrics, ssim


def pictures(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    smooth = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
    first = np.clip(smooth + generator.normal(0, 20, smooth.shape), 0, 255).astype(np.uint8)
    second = np.clip(first + generator.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
    second[: height // 3, : width // 2] = generator.integers(0, 256, 3)
    return first, second


SIZES = [(32, 32), (37, 51), (11, 64), (64, 11)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_ssim_is_scikit_images(height: int, width: int) -> None:
    first, second = pictures(height, width)
    expected = structural_similarity(
        first, second, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
    )
    assert ssim(first, second) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_flip_is_its_authors(height: int, width: int) -> None:
    first, second = pictures(height, width, seed=1)
    expected, mean, _ = flip_evaluator.evaluate(
        first.astype(np.float32) / 255, second.astype(np.float32) / 255, "LDR", applyMagma=False
    )
    found = flip_map(first, second)
    assert np.abs(found - expected[..., 0]).max() < 2e-4  # theirs computes in float32
    assert flip(first, second) == pytest.approx(mean, abs=2e-5)


@pytest.mark.parametrize("value", [0, 128, 255])
def test_equal_and_constant_pictures(value: int) -> None:
    plain = np.full((16, 20, 3), value, dtype=np.uint8)
    assert ssim(plain, plain) == pytest.approx(1.0)
    assert flip(plain, plain) == 0.0
    assert flip(plain, 255 - plain) > (0.5 if value != 128 else 0.0)


def test_a_picture_smaller_than_the_window_has_no_ssim() -> None:
    plain = np.zeros((8, 8, 3), dtype=np.uint8)
    assert math.isnan(ssim(plain, plain))


def test_shapes_must_agree() -> None:
    for function in (ssim, flip):
        with pytest.raises(ConfigError, match=r"\[16, 16, 3\] and \[16, 17, 3\]"):
            function(np.zeros((16, 16, 3), np.uint8), np.zeros((16, 17, 3), np.uint8))


def test_lpips_is_there_or_says_why_not() -> None:
    first, second = pictures(64, 64)
    if lpips_absence() is None:
        assert lpips_distance(first, first) < lpips_distance(first, second)
        return
    assert "lpips" not in perceptual_metrics(first, second)
    with pytest.raises(ConfigError, match="No LPIPS"):
        lpips_distance(first, second)
