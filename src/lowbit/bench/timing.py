"""Timing in alternation, so that whatever slows the machine for a while slows everything alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tqdm import tqdm


def alternate(
    cases: Mapping[str, Callable[[], Any]],
    *,
    repetitions: int,
    warmup: int = 1,
    budget: float = float("inf"),
    least: int = 2,
    progress: str | None = None,
) -> dict[str, list[float]]:
    """Time each case ``repetitions`` times, in turn.

    Args:
        cases: what to call, by name; on an accelerator they wait for it. The order is reversed every other round.
        repetitions: rounds at most.
        warmup: calls of each before.
        budget: seconds; no round starts after.
        least: rounds that are made whatever they take.
        progress: title of a progress bar; ``None`` shows none.

    Returns:
        Seconds of every call, by name.
    """
    names = list(cases)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    bar = tqdm(total=(warmup + repetitions) * len(names), desc=progress, unit="run", disable=progress is None)
    for name in names:
        for _ in range(warmup):
            bar.set_postfix_str(f"warming {name}")
            cases[name]()
            bar.update()
    start = time.perf_counter()
    for repetition in range(repetitions):
        if repetition >= least and time.perf_counter() - start > budget:
            break
        for name in names if repetition % 2 == 0 else reversed(names):
            bar.set_postfix_str(name)
            before = time.perf_counter()
            cases[name]()
            seconds[name].append(time.perf_counter() - before)
            bar.update()
    bar.close()
    return seconds


def summary(seconds: list[float]) -> dict[str, Any]:
    """Return median, least and greatest in milliseconds, and the spread: (greatest - least) / median."""
    median = statistics.median(seconds)
    return {
        "median_ms": round(1e3 * median, 3),
        "min_ms": round(1e3 * min(seconds), 3),
        "max_ms": round(1e3 * max(seconds), 3),
        "spread": round((max(seconds) - min(seconds)) / median, 3),
        "repetitions": len(seconds),
    }


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished what it was given; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
