"""Multiplying groups of channels by a Hadamard matrix.

The matrix is the regular one, a Kronecker power of [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]] / 2,
which unlike Sylvester's has no row of ones that would gather the mean (as ComfyUI's int8 "convrot" has it). Its entries
are powers of two, exact in every dtype.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def hadamard(size: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """Return the regular orthonormal Hadamard matrix, symmetric: [size, size]; ``size`` is a power of four."""
    four = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return matrix.to(device=device, dtype=dtype)


def rotate(x: Tensor, matrix: Tensor) -> Tensor:
    """Multiply each group of channels of x [..., K] by ``matrix`` [g, g], its own inverse; g divides K."""
    rotated: Tensor = x.unflatten(-1, (-1, len(matrix))) @ matrix.to(x.dtype)
    return rotated.flatten(-2)
