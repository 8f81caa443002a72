"""What the benchmarks share with ``lowbit bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowbit.bench.machine import machine, write_results
from lowbit.bench.timing import alternate, summary

__all__ = ["alternate", "machine", "summary", "write"]


def write(path: Path, results: dict[str, Any]) -> None:
    """Write ``results`` with the machine and the date as JSON, and say so."""
    write_results(path, results)
    print(f"wrote {path}")
