"""How far pictures look from their references: SSIM, FLIP, and LPIPS where its weights are at hand."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lowbit.errors import ConfigError
from lowbit.evaluation.metrics import MetricInfo

PERCEPTUAL_METRICS: Mapping[str, MetricInfo] = {
    "ssim": MetricInfo(True, "structural similarity, mean over the RGB channels; 1 for equal pictures"),
    "flip": MetricInfo(False, "mean FLIP error, as seen flipping between both on a screen: 0 to 1"),
    "lpips": MetricInfo(False, "distance of AlexNet's features"),
}

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
PIXELS_PER_DEGREE = 0.7 * 3840 / 0.7 * math.pi / 180
"""Of a 0.7 m wide screen of 3840 pixels seen from 0.7 m: FLIP's default viewer."""


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
        ConfigError: shapes that differ or are not those of pictures.
    """
    _check(reference, candidate)
    if min(reference.shape[:2]) < SSIM_WINDOW:
        return math.nan
    first, second = _to_tensor(reference)[0][:, None], _to_tensor(candidate)[0][:, None]
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64) - SSIM_WINDOW // 2
    window = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    window /= window.sum()

    def blur(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    mean_first, mean_second = blur(first), blur(second)
    variance_first = blur(first * first) - mean_first**2
    variance_second = blur(second * second) - mean_second**2
    covariance = blur(first * second) - mean_first * mean_second
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_first * mean_second + c1) / (mean_first**2 + mean_second**2 + c1)
    structure = (2 * covariance + c2) / (variance_first + variance_second + c2)
    return float((luminance * structure).mean())


# FLIP: Andersson, Nilsson, Akenine-Möller, Oskarsson, Åström, Fairchild, "FLIP: A Difference Evaluator for Alternating
# Images" (HPG 2020). Names of constants follow the paper.
_RGB_TO_XYZ = torch.tensor(
    [
        [10135552 / 24577794, 8788810 / 24577794, 4435075 / 24577794],
        [2613072 / 12288897, 8788810 / 12288897, 887015 / 12288897],
        [1425312 / 73733382, 8788810 / 73733382, 70074185 / 73733382],
    ],
    dtype=torch.float64,
)
_WHITE = _RGB_TO_XYZ.sum(dim=1)
_CSF = {  # contrast sensitivity per opponent channel: a1, b1, a2, b2
    "achromatic": (1.0, 0.0047, 0.0, 1e-5),
    "red_green": (1.0, 0.0053, 0.0, 1e-5),
    "blue_yellow": (34.1, 0.04, 13.5, 0.025),
}
_Q_COLOUR, _P_COLOUR, _P_TARGET = 0.7, 0.4, 0.95
_FEATURE_WIDTH, _Q_FEATURE = 0.082, 0.5


def flip(reference: np.ndarray, candidate: np.ndarray, pixels_per_degree: float = PIXELS_PER_DEGREE) -> float:
    """Return the mean of ``flip_map``."""
    return float(flip_map(reference, candidate, pixels_per_degree).mean())


def flip_map(reference: np.ndarray, candidate: np.ndarray, pixels_per_degree: float = PIXELS_PER_DEGREE) -> np.ndarray:
    """Return where and how strongly two pictures differ to someone who flips between them.

    Args:
        reference: uint8 [H, W, 3], sRGB.
        candidate: likewise.
        pixels_per_degree: of visual angle.

    Returns:
        float64 [H, W], 0 to 1: LDR-FLIP.

    Raises:
        ConfigError: shapes that differ or are not those of pictures.
    """
    _check(reference, candidate)
    opponents = [_linear_to_opponent(_srgb_to_linear(_to_tensor(picture))) for picture in (reference, candidate)]
    colour = _colour_error(opponents[0], opponents[1], pixels_per_degree)
    feature = _feature_error(opponents[0], opponents[1], pixels_per_degree)
    return (colour ** (1.0 - feature))[0, 0].numpy()


def _srgb_to_linear(values: Tensor) -> Tensor:
    return torch.where(values > 0.04045, ((values + 0.055) / 1.055) ** 2.4, values / 12.92)


def _mix(matrix: Tensor, values: Tensor) -> Tensor:
    mixed: Tensor = torch.einsum("ij,njhw->nihw", matrix, values)
    return mixed


def _linear_to_opponent(values: Tensor) -> Tensor:
    """Linear RGB to YCxCz."""
    x, y, z = (_mix(_RGB_TO_XYZ, values) / _WHITE.view(1, 3, 1, 1)).unbind(dim=1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def _opponent_to_linear(values: Tensor) -> Tensor:
    luma, red_green, blue_yellow = values.unbind(dim=1)
    y = (luma + 16) / 116
    xyz = torch.stack([y + red_green / 500, y, y - blue_yellow / 200], dim=1) * _WHITE.view(1, 3, 1, 1)
    return _mix(torch.linalg.inv(_RGB_TO_XYZ), xyz)


def _hunt_lab(linear: Tensor) -> Tensor:
    """Linear RGB to CIELab with chroma scaled by lightness (Hunt's effect)."""
    ratios = _mix(_RGB_TO_XYZ, linear) / _WHITE.view(1, 3, 1, 1)
    delta = 6 / 29
    x, y, z = torch.where(ratios > delta**3, ratios.clamp_min(0) ** (1 / 3), ratios / (3 * delta**2) + 4 / 29).unbind(1)
    lightness = 116 * y - 16
    return torch.stack([lightness, 0.01 * lightness * 500 * (x - y), 0.01 * lightness * 200 * (y - z)], dim=1)


def _hyab(first: Tensor, second: Tensor) -> Tensor:
    difference = first - second
    chroma: Tensor = torch.linalg.vector_norm(difference[:, 1:], dim=1, keepdim=True)
    return difference[:, :1].abs() + chroma


def _filter(values: Tensor, kernel: Tensor) -> Tensor:
    """Correlate one channel with a square kernel, the border continued by its nearest pixels."""
    radius = kernel.shape[-1] // 2
    padded: Tensor = F.pad(values, (radius,) * 4, mode="replicate")
    return F.conv2d(padded, kernel[None, None])


def _contrast_filters(pixels_per_degree: float) -> list[Tensor]:
    broadest = max(b for _, b1, _, b2 in _CSF.values() for b in (b1, b2))
    radius = math.ceil(3 * math.sqrt(broadest / (2 * math.pi**2)) * pixels_per_degree)
    squared = _squared_radius(radius) / pixels_per_degree**2
    kernels = []
    for a1, b1, a2, b2 in _CSF.values():
        kernel = a1 * math.sqrt(math.pi / b1) * torch.exp(-(math.pi**2) * squared / b1)
        kernel = kernel + a2 * math.sqrt(math.pi / b2) * torch.exp(-(math.pi**2) * squared / b2)
        kernels.append(kernel / kernel.sum())
    return kernels


def _squared_radius(radius: int) -> Tensor:
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    return offsets[:, None] ** 2 + offsets[None, :] ** 2


def _colour_error(reference: Tensor, candidate: Tensor, pixels_per_degree: float) -> Tensor:
    kernels = _contrast_filters(pixels_per_degree)

    def seen(opponent: Tensor) -> Tensor:
        channels = [_filter(opponent[:, i : i + 1], kernel) for i, kernel in enumerate(kernels)]
        return _hunt_lab(_opponent_to_linear(torch.cat(channels, dim=1)).clamp(0, 1))

    error = _hyab(seen(reference), seen(candidate)) ** _Q_COLOUR
    green, blue = (torch.tensor(c, dtype=torch.float64).view(1, 3, 1, 1) for c in ((0.0, 1.0, 0.0), (0.0, 0.0, 1.0)))
    largest = float(_hyab(_hunt_lab(green), _hunt_lab(blue)) ** _Q_COLOUR)
    knee = _P_COLOUR * largest
    above = _P_TARGET + (error - knee) / (largest - knee) * (1 - _P_TARGET)
    return torch.where(error < knee, _P_TARGET / knee * error, above)


def _feature_error(reference: Tensor, candidate: Tensor, pixels_per_degree: float) -> Tensor:
    deviation = 0.5 * _FEATURE_WIDTH * pixels_per_degree
    radius = math.ceil(3 * deviation)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    gaussian = torch.exp(-_squared_radius(radius) / (2 * deviation**2))
    edge = _balance(-offsets[None, :] * gaussian)
    point = _balance((offsets[None, :] ** 2 / deviation**2 - 1) * gaussian)

    def strength(opponent: Tensor, kernel: Tensor) -> Tensor:
        luma = (opponent[:, :1] + 16) / 116
        return torch.hypot(_filter(luma, kernel), _filter(luma, kernel.T.contiguous()))

    differences = [(strength(reference, kernel) - strength(candidate, kernel)).abs() for kernel in (edge, point)]
    return (torch.maximum(*differences) / math.sqrt(2)) ** _Q_FEATURE


def _balance(kernel: Tensor) -> Tensor:
    """Scale a kernel so that its positive weights sum to 1 and its negative ones to -1."""
    positive, negative = kernel.clamp_min(0), kernel.clamp_max(0)
    return positive / positive.sum() - negative / negative.sum()


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
    absence = lpips_absence()
    if absence:
        raise ConfigError(f"No LPIPS: {absence}")
    first, second = (_to_tensor(picture).float() * 2 - 1 for picture in (reference, candidate))
    with torch.no_grad():
        return float(_lpips_model()(first, second))


def perceptual_metrics(reference: np.ndarray, candidate: np.ndarray) -> dict[str, float]:
    """Return SSIM, FLIP and, where it can be had, LPIPS of two pictures, uint8 [H, W, 3]."""
    functions: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {"ssim": ssim, "flip": flip}
    if lpips_absence() is None:
        functions["lpips"] = lpips_distance
    return {name: function(reference, candidate) for name, function in functions.items()}
