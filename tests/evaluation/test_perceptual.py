import math

import numpy as np
import pytest

from lowbit.errors import ConfigError
from lowbit.evaluation.comparison import known_figures
from lowbit.evaluation.perceptual import check_perceptual, flip, lpips_absence, lpips_distance, perceptual_metrics, ssim


def pictures(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    smooth = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
    first = np.clip(smooth + generator.normal(0, 20, smooth.shape), 0, 255).astype(np.uint8)
    second = np.clip(first + generator.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
    second[: height // 3, : width // 2] = generator.integers(0, 256, 3)
    return first, second


SIZES = [(32, 32), (37, 51), (11, 64), (64, 11)]


# Of lowbit 0.1.0's own implementations in float64, which gave what both packages give.
SSIM = [0.8028758897668374, 0.7484459258400479, 0.7927705911570582, 0.6197655349242245]
FLIP = [0.23855311988476213, 0.277130830815342, 0.2645000535448142, 0.2683231665299392]


@pytest.mark.parametrize(("size", "expected"), [*zip(SIZES, SSIM, strict=True)])
def test_ssim_is_what_it_was(size: tuple[int, int], expected: float) -> None:
    assert ssim(*pictures(*size)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("size", "expected"), [*zip(SIZES, FLIP, strict=True)])
def test_flip_is_what_it_was(size: tuple[int, int], expected: float) -> None:
    assert flip(*pictures(*size, seed=1)) == pytest.approx(expected, abs=2e-5)  # the package computes in float32


@pytest.mark.parametrize("name", ["ssim", "flip"])
def test_a_package_that_is_missing_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=rf"No {name.upper()}: the package .*pip install 'lowbit\[perceptual\]'"):
        {"ssim": ssim, "flip": flip}[name](*pictures(16, 16))
    with pytest.raises(ConfigError, match="No SSIM"):
        check_perceptual()
    assert name not in known_figures(perceptual=True)


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
