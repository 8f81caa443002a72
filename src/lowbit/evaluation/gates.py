"""Policies over a comparison's figures: ``psnr_db>=25,mae<=6,max_peak_memory_ratio<=0.95``."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from lowbit.errors import ConfigError, expected_one_of
from lowbit.evaluation.metrics import OUTPUT_METRICS

RATIOS: Mapping[str, str] = {
    "avg_generation_time_ratio": "candidate's average generation time over the reference's",
    "max_peak_memory_ratio": "candidate's peak memory over the reference's",
}
"""Figures that a gate may name beside the output metrics."""

_CONDITION = re.compile(r"\s*([A-Za-z_0-9]+)\s*(>=|<=|>|<)\s*([-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?|inf)\s*")
_HOLDS = {
    ">=": lambda found, bound: found >= bound,
    "<=": lambda found, bound: found <= bound,
    ">": lambda found, bound: found > bound,
    "<": lambda found, bound: found < bound,
}


@dataclass(frozen=True)
class Condition:
    """One clause of a gate: ``metric operator bound``."""

    metric: str
    operator: str
    bound: float

    def __str__(self) -> str:
        return f"{self.metric}{self.operator}{self.bound:g}"


@dataclass(frozen=True)
class Verdict:
    """A condition with the figure it was held against. An undefined figure (NaN) never holds."""

    condition: Condition
    found: float

    @property
    def ok(self) -> bool:
        """Whether the condition holds."""
        return not math.isnan(self.found) and _HOLDS[self.condition.operator](self.found, self.condition.bound)

    def __str__(self) -> str:
        return f"{'pass' if self.ok else 'FAIL'}  {self.condition}  (found {self.found:.6g})"


def preset(name: str) -> tuple[Condition, ...]:
    """Return the recommended thresholds called ``"smoke"`` or ``"strict"``."""
    bounds = {metric: getattr(info, name) for metric, info in OUTPUT_METRICS.items()}
    return tuple(
        Condition(metric, ">=" if OUTPUT_METRICS[metric].higher_is_better else "<=", bound)
        for metric, bound in bounds.items()
        if bound is not None
    )


PRESETS = ("smoke", "strict")


def parse_gate(text: str, known: Collection[str] | None = None) -> tuple[Condition, ...]:
    """Read a gate: conditions and presets, separated by commas.

    Args:
        text: such as ``"strict,max_peak_memory_ratio<=0.95"``.
        known: names of the figures that will be there; ``None``: all output metrics and ratios.

    Raises:
        ConfigError: a clause that is no condition, or a figure that won't be there.
    """
    names = tuple(known) if known is not None else (*OUTPUT_METRICS, *RATIOS)
    conditions: list[Condition] = []
    for clause in text.split(","):
        if clause.strip() in PRESETS:
            conditions += preset(clause.strip())
            continue
        match = _CONDITION.fullmatch(clause)
        if match is None:
            raise ConfigError(
                f"--gate: {clause.strip()!r} is no condition such as psnr_db>=25, nor one of {', '.join(PRESETS)}"
            )
        metric, operator, bound = match.groups()
        if metric not in names:
            close = get_close_matches(metric, names, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"--gate: nothing called {metric!r} is computed{hint} {expected_one_of(names)}")
        conditions.append(Condition(metric, operator, _number(bound, clause)))
    return tuple(conditions)


def _number(text: str, clause: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--gate: {clause.strip()!r}: {text!r} is no number") from None


def judge(conditions: Sequence[Condition], figures: Mapping[str, float]) -> list[Verdict]:
    """Hold every condition against its figure.

    Raises:
        ConfigError: a figure that was not computed.
    """
    absent = [condition.metric for condition in conditions if condition.metric not in figures]
    if absent:
        raise ConfigError(f"--gate: {', '.join(absent)} was not computed. {expected_one_of(figures)}")
    return [Verdict(condition, figures[condition.metric]) for condition in conditions]
