"""Fitting TeaCache's coefficients to a model from its own trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tqdm import tqdm

from lowbit.cache.tea_cache import Recording, fit, polynomial
from lowbit.evaluation.recording import Task

if TYPE_CHECKING:
    from lowbit.engine import Omni


@dataclass(frozen=True)
class CacheFit:
    """Coefficients for a transformer and how well they fit.

    Attributes:
        component: the transformer's name in the pipeline.
        coefficients: five, highest power first.
        pairs: (change of the signal, change of the residual) of every step.
        r_squared: share of the residual changes' variance that the polynomial explains.
    """

    component: str
    coefficients: Sequence[float]
    pairs: Sequence[tuple[float, float]]
    r_squared: float


def calibrate(omni: Omni, task: Task) -> list[CacheFit]:
    """Run every case without skipping and fit each transformer's coefficients.

    Raises:
        ConfigError: a transformer that TeaCache does not know, or too few steps.
    """
    recording, former = Recording(), omni.cache
    recording.check(omni.transformers())
    omni.cache = recording
    try:
        for _, prompt, seed in tqdm(task.cases, desc="calibrating", unit="case"):
            omni.generate(prompt, replace(task.params, seed=seed), progress=False)
    finally:
        omni.cache = former
    pairs = recording.pairs
    return [_fit(name, values) for name, values in pairs.items()]


def _fit(component: str, pairs: Sequence[tuple[float, float]]) -> CacheFit:
    coefficients = fit(pairs)
    values = [value for _, value in pairs]
    mean = sum(values) / len(values)
    spread = sum((value - mean) ** 2 for value in values)
    left = sum((value - polynomial(coefficients, change)) ** 2 for change, value in pairs)
    return CacheFit(component, coefficients, pairs, 1.0 - left / spread if spread else 1.0)
