"""What implementations share whose kernels read a checkpoint's own layout: see ``lowbit.ops.dispatch``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lowbit.ops.dispatch import Problem


def supports(problem: Problem) -> str | None:
    """Return ``None``: plain torch runs everywhere."""
    return None


def pack_weight(weight: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
    """Return ``weight``, dense."""
    return weight.contiguous()


def unpack_weight(packed: torch.Tensor) -> torch.Tensor:
    """Return ``packed``: see ``pack_weight``."""
    return packed


def apply_to_rows(product: Callable[..., torch.Tensor], x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """Return ``product(rows, *arguments)`` [M, N] of the rows [M, K] of x [..., K] as [..., N]."""
    if x.ndim == 2:
        return product(x, *arguments)
    result = product(x.reshape(-1, x.shape[-1]), *arguments)
    return result.reshape(*x.shape[:-1], result.shape[-1])
