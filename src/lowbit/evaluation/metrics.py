"""How far pictures, frames or latents are from their references.

All sums are made in float64. Of pictures the unit is that of 8-bit pixels. A figure that is infinite (the PSNR of equal
pictures) or undefined (the cosine with a black picture) stays so in Python and becomes ``"inf"`` or ``null`` in JSON.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lowbit.errors import ConfigError

PEAK = 255.0


@dataclass(frozen=True)
class MetricInfo:
    """What a metric means.

    Attributes:
        higher_is_better: its direction.
        meaning: in a sentence.
        smoke: threshold for a quick check, ``None`` where none is recommended.
        strict: threshold for a release.
    """

    higher_is_better: bool
    meaning: str
    smoke: float | None = None
    strict: float | None = None


# Thresholds and meanings: vLLM-Omni's quantization overview, "Output Similarity Comparison Tool".
OUTPUT_METRICS: Mapping[str, MetricInfo] = {
    "cosine_similarity": MetricInfo(True, "cosine of the angle between the pixels as vectors", 0.98, 0.995),
    "mae": MetricInfo(False, "mean absolute error in 8-bit pixel units", 12.0, 6.0),
    "mse": MetricInfo(False, "mean squared error in 8-bit pixel units, squared"),
    "rmse": MetricInfo(False, "root of the mean squared error in 8-bit pixel units"),
    "max_abs": MetricInfo(False, "largest error of one pixel's channel: a sign of outliers, not a gate"),
    "l2": MetricInfo(False, "Euclidean norm of the difference"),
    "relative_l2": MetricInfo(False, "norm of the difference over the norm of the reference", 0.20, 0.08),
    "psnr_db": MetricInfo(True, "peak signal-to-noise ratio in dB; infinite for equal pictures", 20.0, 25.0),
}


def difference_metrics(reference: np.ndarray, candidate: np.ndarray) -> dict[str, float]:
    """Compare two arrays as vectors.

    Args:
        reference: any shape and real dtype.
        candidate: of the same shape.

    Returns:
        ``cosine_similarity``, ``mae``, ``mse``, ``rmse``, ``max_abs``, ``l2`` and ``relative_l2``. The cosine of two
        zero vectors is 1, of a zero and another one NaN; the relative L2 against zero is 0 or infinite.

    Raises:
        ConfigError: the shapes differ or are empty.
    """
    if reference.shape != candidate.shape or reference.size == 0:
        raise ConfigError(f"Can't compare {list(reference.shape)} with {list(candidate.shape)}")
    expected, found = (array.astype(np.float64).ravel() for array in (reference, candidate))
    difference = found - expected
    norm, other_norm, distance = (float(np.linalg.norm(values)) for values in (expected, found, difference))
    mse = float(np.mean(difference**2))
    return {
        "cosine_similarity": _cosine(float(expected @ found), norm, other_norm, equal=distance == 0),
        "mae": float(np.mean(np.abs(difference))),
        "mse": mse,
        "rmse": math.sqrt(mse),
        "max_abs": float(np.max(np.abs(difference))),
        "l2": distance,
        "relative_l2": _ratio(distance, norm),
    }


def picture_metrics(reference: np.ndarray, candidate: np.ndarray) -> dict[str, float]:
    """Compare uint8 pictures or frames of one shape: ``difference_metrics`` and ``psnr_db``.

    Raises:
        ConfigError: a dtype other than uint8, or shapes that differ.
    """
    for array in (reference, candidate):
        if array.dtype != np.uint8:
            raise ConfigError(f"Pictures must be uint8, not {array.dtype}")
    found = difference_metrics(reference, candidate)
    mse = found["mse"]
    return {**found, "psnr_db": math.inf if mse == 0 else 10.0 * math.log10(PEAK**2 / mse)}


def _cosine(product: float, norm: float, other_norm: float, *, equal: bool) -> float:
    if equal:
        return 1.0
    if norm == 0 or other_norm == 0:
        return math.nan
    return max(-1.0, min(1.0, product / norm / other_norm))


def _ratio(distance: float, norm: float) -> float:
    if norm == 0:
        return 0.0 if distance == 0 else math.inf
    return distance / norm


def median_and_worst(rows: Sequence[Mapping[str, float]], higher_is_better: Mapping[str, bool]) -> dict[str, Any]:
    """Summarize metrics over several pictures.

    Args:
        rows: the metrics of each.
        higher_is_better: each metric's direction; those it lacks are left out.

    Returns:
        ``{"median": {...}, "worst": {...}}``. An undefined value makes both undefined: it is not to be overlooked.
    """
    summary: dict[str, dict[str, float]] = {"median": {}, "worst": {}}
    for name, higher in higher_is_better.items():
        values = [row[name] for row in rows if name in row]
        if not values:
            continue
        undefined = any(math.isnan(value) for value in values)
        summary["median"][name] = math.nan if undefined else statistics.median(values)
        summary["worst"][name] = math.nan if undefined else (min(values) if higher else max(values))
    return summary


def to_json(value: Any) -> Any:
    """Return ``value`` for strict JSON: infinite floats as ``"inf"`` or ``"-inf"``, NaN as ``None``."""
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value
