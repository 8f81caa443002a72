"""What the benchmarks share: timing in alternation, describing the machine, writing results."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lowbit.ops.cpu import native

FLAGS_OF_INTEREST = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
PACKAGES = ("torch", "diffusers", "torchao", "optimum-quanto")
ALLOCATOR_VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_", "MALLOC_TRIM_THRESHOLD_", "THP_MEM_ALLOC_ENABLE")


def alternate(
    cases: Mapping[str, Callable[[], Any]], *, repetitions: int, warmup: int = 1, budget: float = float("inf")
) -> dict[str, list[float]]:
    """Time each case ``repetitions`` times, in turn, so that whatever slows the machine for a while slows all.

    Args:
        cases: what to call, by name. The order is reversed every other round.
        repetitions: rounds at most.
        warmup: calls of each before.
        budget: seconds; no round starts after, but two are made.

    Returns:
        Seconds of every call, by name.
    """
    names = list(cases)
    for name in names:
        for _ in range(warmup):
            cases[name]()
    if warmup:
        print(f"warm: {', '.join(names)}", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for repetition in range(repetitions):
        if repetition >= 2 and time.perf_counter() - start > budget:
            break
        for name in names if repetition % 2 == 0 else reversed(names):
            before = time.perf_counter()
            cases[name]()
            seconds[name].append(time.perf_counter() - before)
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


def machine() -> dict[str, Any]:
    """Describe what the numbers depend on."""
    model, flags = _cpu()
    return {
        "cpu": model,
        "flags": [flag for flag in FLAGS_OF_INTEREST if flag in flags],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES if _version(name)},
        "commit": _commit(),
        "native": native.description(),
        "allocator": {name: os.environ[name] for name in ALLOCATOR_VARIABLES if name in os.environ},
    }


def write(path: Path, results: dict[str, Any]) -> None:
    """Write ``results`` with the machine and the date as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"date": time.strftime("%Y-%m-%d"), "machine": machine()}
    path.write_text(json.dumps({**head, **results}, indent=1) + "\n")
    print(f"wrote {path}")


def _cpu() -> tuple[str, set[str]]:
    model, flags = platform.processor() or platform.machine(), set[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return model, flags
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        elif key.strip() == "flags":
            flags = set(value.split())
    return model, flags


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
