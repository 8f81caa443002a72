"""Keeping freed memory in the process, on glibc.

glibc maps fresh pages for every large block and gives them back when it is freed, so in eager mode each large tensor
costs a page fault per 4 KiB, often more time than the computation. ``keep_freed_memory`` makes the process keep them,
``release_freed_memory`` restores glibc's defaults and returns what is free. Nothing calls them unasked: the settings
are those of the whole process, and memory stays at its high-water mark while they last.

The environment does the same from the start: ``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184
MALLOC_TOP_PAD_=67108864``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

# From malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4

DEFAULT_MMAP_MAX = 65536
DEFAULT_THRESHOLD = 128 << 10  # of trimming and of mapping
DEFAULT_TOP_PAD = 0
LARGEST = (1 << 31) - 1  # mallopt takes an int
TOP_PAD = 64 << 20


def keep_freed_memory() -> bool:
    """Let the process keep freed memory for its next tensors; return whether the C library could be told."""
    return _mallopt((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, LARGEST), (M_TOP_PAD, TOP_PAD))


def release_freed_memory() -> bool:
    """Restore glibc's defaults and give free memory back; return whether the C library could be told."""
    restored = _mallopt(
        (M_MMAP_MAX, DEFAULT_MMAP_MAX),
        (M_TRIM_THRESHOLD, DEFAULT_THRESHOLD),
        (M_MMAP_THRESHOLD, DEFAULT_THRESHOLD),
        (M_TOP_PAD, DEFAULT_TOP_PAD),
    )
    if restored:
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
    return restored


@contextmanager
def freed_memory_kept() -> Iterator[bool]:
    """Keep freed memory inside the ``with`` block; gives whether it is."""
    kept = keep_freed_memory()
    try:
        yield kept
    finally:
        if kept:
            release_freed_memory()


def _mallopt(*settings: tuple[int, int]) -> bool:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False  # not glibc
    return all(mallopt(name, value) == 1 for name, value in settings)
