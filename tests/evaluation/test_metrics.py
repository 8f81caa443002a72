import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio

from lowbit.errors import ConfigError
from lowbit.evaluation.metrics import difference_metrics, median_and_worst, picture_metrics, to_json

SHAPES = [(1, 1, 3), (7, 5, 3), (64, 64, 3), (2, 13, 9, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_pictures_against_scikit_image_and_numpy(shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(sum(shape))
    first, second = (generator.integers(0, 256, shape, dtype=np.uint8) for _ in range(2))
    found = picture_metrics(first, second)
    a, b = first.astype(np.float64).ravel(), second.astype(np.float64).ravel()
    assert found["psnr_db"] == pytest.approx(peak_signal_noise_ratio(first, second, data_range=255), rel=1e-12)
    assert found["mse"] == pytest.approx(mean_squared_error(first, second), rel=1e-12)
    assert found["rmse"] == pytest.approx(math.sqrt(found["mse"]), rel=1e-12)
    assert found["mae"] == pytest.approx(np.abs(a - b).mean(), rel=1e-12)
    assert found["max_abs"] == np.abs(a - b).max()
    assert found["l2"] == pytest.approx(np.linalg.norm(a - b), rel=1e-12)
    assert found["relative_l2"] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-12)
    assert found["cosine_similarity"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-12)


@given(arrays(np.uint8, st.sampled_from(SHAPES)))
def test_a_picture_equals_itself(picture: np.ndarray) -> None:
    found = picture_metrics(picture, picture)
    assert found["psnr_db"] == math.inf
    assert found["cosine_similarity"] == 1.0
    assert all(found[name] == 0 for name in ("mae", "mse", "rmse", "max_abs", "l2", "relative_l2"))


def test_uint8_does_not_wrap_around() -> None:
    black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    assert picture_metrics(black, white)["mae"] == 255
    assert picture_metrics(white, black)["psnr_db"] == pytest.approx(0.0)


def test_what_is_undefined_is_said_to_be() -> None:
    black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    found = picture_metrics(black, white)
    assert math.isnan(found["cosine_similarity"])
    assert found["relative_l2"] == math.inf
    text = json.dumps(to_json(found), allow_nan=False)
    assert json.loads(text)["cosine_similarity"] is None
    assert json.loads(text)["relative_l2"] == "inf"


def test_what_can_not_be_compared() -> None:
    with pytest.raises(ConfigError, match=r"\[2, 3\] with \[3, 2\]"):
        difference_metrics(np.zeros((2, 3)), np.zeros((3, 2)))
    with pytest.raises(ConfigError, match="uint8, not float32"):
        picture_metrics(np.zeros((2, 2, 3), np.float32), np.zeros((2, 2, 3), np.float32))


def test_median_and_worst_follow_each_metrics_direction() -> None:
    rows = [{"psnr_db": 30.0, "mae": 1.0}, {"psnr_db": math.inf, "mae": 5.0}, {"psnr_db": 20.0, "mae": 2.0}]
    found = median_and_worst(rows, {"psnr_db": True, "mae": False, "ssim": True})
    assert found == {"median": {"psnr_db": 30.0, "mae": 2.0}, "worst": {"psnr_db": 20.0, "mae": 5.0}}
    undefined = median_and_worst([{"mae": math.nan}, {"mae": 1.0}], {"mae": False})
    assert math.isnan(undefined["worst"]["mae"])
