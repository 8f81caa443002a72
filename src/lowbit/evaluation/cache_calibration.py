"""Fitting TeaCache's coefficients to a model from its own trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tqdm import tqdm

from lowbit.cache.tea_cache import FAMILIES, fit, polynomial, recorded
from lowbit.errors import ConfigError
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
    transformers = omni.transformers()
    unknown = [type(part).__name__ for part in transformers.values() if type(part).__name__ not in FAMILIES]
    if unknown:
        raise ConfigError(f"tea_cache does not know {unknown[0]}. It knows: {', '.join(FAMILIES)}")
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in transformers}
    for _, prompt, seed in tqdm(task.cases, desc="calibrating", unit="case"):
        with recorded(omni.pipeline, transformers, 0) as found:
            omni.generate(prompt, replace(task.params, seed=seed), progress=False)
        for name, values in found.items():
            pairs[name] += values
    return [_fit(name, values) for name, values in pairs.items()]


def _fit(component: str, pairs: Sequence[tuple[float, float]]) -> CacheFit:
    coefficients = fit(pairs)
    values = [value for _, value in pairs]
    mean = sum(values) / len(values)
    spread = sum((value - mean) ** 2 for value in values)
    left = sum((value - polynomial(coefficients, change)) ** 2 for change, value in pairs)
    return CacheFit(component, coefficients, pairs, 1.0 - left / spread if spread else 1.0)
