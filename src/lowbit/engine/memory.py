"""Measuring peak memory."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFERENCES = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): resets the peak resident set size


class PeakMemory:
    """The highest memory since its construction: of the device's allocator, or on a CPU of this process.

    Where the operating system can't reset a process's peak (outside Linux), it is the peak since the process began.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(device)
        elif _CLEAR_REFERENCES.exists():
            with suppress(OSError):  # a locked-down container: the peak since the start is reported
                _CLEAR_REFERENCES.write_text(_RESET_PEAK)

    def megabytes(self) -> float:
        """Return the peak in 10^6 bytes."""
        if self.device.type != "cpu":
            return float(torch.accelerator.max_memory_allocated(self.device)) / 1e6
        return peak_resident_bytes() / 1e6


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
