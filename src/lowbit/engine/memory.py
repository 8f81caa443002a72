"""Measuring peak memory."""

from __future__ import annotations

import sys
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFERENCES = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): resets the peak resident set size


class PeakMemory:
    """The highest memory since its construction: of the device's allocator, or on a CPU of this process.

    Measurements may overlap, in one thread or several: each keeps what it saw before another resets the counter. They
    measure the same memory, all that the process uses meanwhile. Where the operating system can't reset a process's
    peak (outside Linux), it is the peak since the process began.
    """

    _under_way: ClassVar[weakref.WeakSet[PeakMemory]] = weakref.WeakSet()
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seen = 0.0
        with self._lock:
            for other in self._under_way:
                other._seen = max(other._seen, _peak(other.device))
            self._under_way.add(self)
            _reset_peak(device)

    def megabytes(self) -> float:
        """Return the peak in 10^6 bytes."""
        with self._lock:
            return max(self._seen, _peak(self.device)) / 1e6


def _reset_peak(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
    elif _CLEAR_REFERENCES.exists():
        with suppress(OSError):  # a locked-down container: the peak since the start is reported
            _CLEAR_REFERENCES.write_text(_RESET_PEAK)


def _peak(device: torch.device) -> float:
    """Return the peak since the last reset in bytes."""
    if device.type != "cpu":
        return float(torch.accelerator.max_memory_allocated(device))
    return float(peak_resident_bytes())


def peak_resident_bytes() -> int:
    """Return this process's peak resident memory in bytes."""
    if _STATUS.exists():
        return status_bytes("VmHWM")
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def status_bytes(field: str) -> int:
    """Return a field of ``/proc/self/status`` (``VmHWM``, ``RssAnon``...) in bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0
