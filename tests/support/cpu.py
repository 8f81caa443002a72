"""What tests of kernels for CPUs share: inputs, exact comparison, memory with an end, instruction sets."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator

import pytest
import torch

from lowbit.ops.cpu import helper


def selected_isa(name: str, *, exact: bool = False) -> Iterator[str]:
    """Select an instruction set for a test; unless ``exact``, one for "AVX-512" runs by less where that is all."""
    isa = helper.ISA_NAMES.index(name)
    chosen = isa if helper.refusal() is not None else helper.select_isa(isa)
    if chosen != isa and (exact or name != "AVX-512"):
        helper.select_isa(helper.BEST_ISA)
        pytest.skip(f"the CPU has no {name}")
    yield name
    if helper.refusal() is None:
        helper.select_isa(helper.BEST_ISA)


def awkward(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Return activations whose first rows are what breaks quantizers; all finite."""
    x = torch.randn(rows, columns) * torch.randn(rows, 1).exp()
    cases = [
        torch.zeros(columns),
        -torch.zeros(columns),
        torch.randn(columns) * 1e-38,  # below the smallest absmax; subnormal in part
        torch.randn(columns).clamp(-4, 4) * 1e4,
        torch.where(torch.arange(columns) == 3, 1000.0, x[0]),  # an outlier
        torch.arange(columns) % 8 - 3.5,  # ties
        torch.full((columns,), 3.0),
    ]
    for row, case in enumerate(cases[:rows]):
        x[row] = case
    return x.to(dtype)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether dtype, shape and every value are equal, NaN to NaN."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    a, b = left.double(), right.double()
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def at_the_end_of_memory(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a dense ``tensor`` after whose last byte a page begins that ends the process if it is read."""
    if not sys.platform.startswith("linux"):
        pytest.skip("protects memory as Linux does")
    size = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    after = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(after), mmap.PAGESIZE, 0) == 0
    copy = torch.frombuffer(memory, dtype=torch.uint8, offset=size - tensor.nbytes, count=tensor.nbytes)
    copy.copy_(tensor.flatten().view(torch.uint8))
    return copy.view(tensor.dtype).view(tensor.shape)
