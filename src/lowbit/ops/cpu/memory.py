"""Keeping freed memory in the process, on glibc; letting go of mapped memory that was read, on Linux.

glibc maps fresh pages for every large block and gives them back when it is freed, so in eager mode each large tensor
costs a page fault per 4 KiB, often more time than the computation. ``keep_freed_memory`` makes the process keep them,
``release_freed_memory`` restores glibc's defaults and returns what is free. Nothing calls them unasked: the settings
are those of the whole process, and memory stays at its high-water mark while they last.

The environment does the same from the start: ``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184
MALLOC_TOP_PAD_=67108864``.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

# From malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4

DEFAULT_MMAP_MAX = 65536
DEFAULT_THRESHOLD = 128 << 10  # of trimming and of mapping
DEFAULT_TOP_PAD = 0
LARGEST = (1 << 31) - 1  # mallopt takes an int
TOP_PAD = 64 << 20

_MAPS = Path("/proc/self/maps")


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


class MappedTensors:
    """The tensors of a mapped file, each of which is read once.

    Pages of a mapped file that were read count as this process's resident memory, and as its peak, until they are
    unmapped. Outside Linux nothing is done.

    Attributes:
        tensors: by name. As long as they are held here, the ranges found at first are theirs.
        ranges: addresses at which one of the files is mapped.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], files: Iterable[str | Path]) -> None:
        self.tensors = tensors
        self.ranges = [*mapped_ranges(frozenset(str(Path(file).resolve()) for file in files))]

    def release(self, name: str) -> int:
        """Unmap the whole pages that a tensor covers, if it lies in a mapping of one of the files.

        It stays as it is: what is read again is mapped again. It must not have been written to.

        Returns:
            The bytes that were let go.
        """
        tensor = self.tensors[name]
        first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if last <= first or not any(begin <= first and last <= end for begin, end in self.ranges):
            return 0
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        return last - first if madvise(first, last - first, mmap.MADV_DONTNEED) == 0 else 0


def mapped_ranges(names: frozenset[str]) -> Iterator[tuple[int, int]]:
    """Yield the address ranges of this process that map files called ``names`` (proc(5), ``/proc/pid/maps``)."""
    if not _MAPS.exists():
        return
    for line in _MAPS.read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] in names:
            begin, end = fields[0].split("-")
            yield int(begin, 16), int(end, 16)
