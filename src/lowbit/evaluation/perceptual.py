"""How far pictures look from their references: SSIM and FLIP by their packages, LPIPS where its weights are."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import ConfigError
from lowbit.evaluation.metrics import MetricInfo

PERCEPTUAL_METRICS: Mapping[str, MetricInfo] = {
    "ssim": MetricInfo(True, "structural similarity, mean over the RGB channels; 1 for equal pictures"),
    "flip": MetricInfo(False, "mean FLIP error, as seen flipping between both on a screen: 0 to 1"),
    "lpips": MetricInfo(False, "distance of AlexNet's features"),
}

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
_PACKAGES = {"ssim": ("skimage", "scikit-image"), "flip": ("flip_evaluator", "flip-evaluator")}


def _to_tensor(picture: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] to float64 [1, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].double() / 255.0


def _check(reference: np.ndarray, candidate: np.ndarray) -> None:
    if reference.shape != candidate.shape or reference.ndim != 3 or reference.shape[2] != 3:
        raise ConfigError(f"Can't compare pictures of shapes {list(reference.shape)} and {list(candidate.shape)}")


def ssim(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Return the mean structural similarity of two pictures, uint8 [H, W, 3].

    Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural similarity" (2004):
    a Gaussian window of 11 by 11 pixels and standard deviation 1.5, K1 = 0.01, K2 = 0.03, population covariances, the
    mean over the three channels and all windows inside the picture. NaN for a picture smaller than the window.

    Raises:
        ConfigError: shapes that differ or are not those of pictures, or no package scikit-image.
    """
    _check(reference, candidate)
    _require("ssim")
    if min(reference.shape[:2]) < SSIM_WINDOW:
        return math.nan
    from skimage.metrics import structural_similarity

    settings = {"gaussian_weights": True, "sigma": SSIM_SIGMA, "use_sample_covariance": False, "data_range": 255}
    return float(structural_similarity(reference, candidate, channel_axis=2, **settings))


def flip(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Return the mean LDR-FLIP error of two sRGB pictures, uint8 [H, W, 3]: 0 to 1.

    Andersson, Nilsson, Akenine-Möller, Oskarsson, Åström, Fairchild, "FLIP: A Difference Evaluator for Alternating
    Images" (HPG 2020), by its authors' package, for a 0.7 m wide screen of 3840 pixels seen from 0.7 m.

    Raises:
        ConfigError: shapes that differ or are not those of pictures, or no package flip-evaluator.
    """
    _check(reference, candidate)
    _require("flip")
    import flip_evaluator

    values = [np.ascontiguousarray(picture, dtype=np.float32) / 255 for picture in (reference, candidate)]
    _, mean, _ = flip_evaluator.evaluate(*values, "LDR", applyMagma=False)
    return float(mean)


def absence(name: str) -> str | None:
    """Say why a metric of ``PERCEPTUAL_METRICS`` can't be computed, or ``None`` where it can."""
    if name == "lpips":
        return lpips_absence()
    module, package = _PACKAGES[name]
    if importlib.util.find_spec(module) is None:
        return f"the package {package} is not installed: pip install 'lowbit[perceptual]'"
    return None


def check_perceptual() -> None:
    """Check that SSIM and FLIP can be computed.

    Raises:
        ConfigError: a package is not installed.
    """
    for name in _PACKAGES:
        _require(name)


def _require(name: str) -> None:
    reason = absence(name)
    if reason:
        raise ConfigError(f"No {name.upper()}: {reason}")


def lpips_absence() -> str | None:
    """Say why LPIPS can't be computed, or ``None`` where it can."""
    if importlib.util.find_spec("lpips") is None:
        return "the package lpips is not installed: pip install 'lowbit[lpips]'"
    checkpoints = Path(torch.hub.get_dir()) / "checkpoints"
    if not any(checkpoints.glob("alexnet-*.pth")):
        return f"AlexNet's weights are not in {checkpoints}; torchvision's alexnet(weights='DEFAULT') fetches them"
    return None


@lru_cache(maxsize=1)
def _lpips_model() -> Any:
    import lpips

    return lpips.LPIPS(net="alex", verbose=False).eval()


def lpips_distance(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Return LPIPS with AlexNet (Zhang and others, 2018) of two pictures, uint8 [H, W, 3].

    Raises:
        ConfigError: what ``lpips_absence`` says.
    """
    _require("lpips")
    first, second = (_to_tensor(picture).float() * 2 - 1 for picture in (reference, candidate))
    with torch.no_grad():
        return float(_lpips_model()(first, second))


def perceptual_metrics(reference: np.ndarray, candidate: np.ndarray) -> dict[str, float]:
    """Return SSIM, FLIP and, where it can be had, LPIPS of two pictures, uint8 [H, W, 3]."""
    functions: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {"ssim": ssim, "flip": flip}
    if lpips_absence() is None:
        functions["lpips"] = lpips_distance
    return {name: function(reference, candidate) for name, function in functions.items()}
