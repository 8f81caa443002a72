"""What implementations share whose kernels read a checkpoint's own layout: see ``lowbit.ops.dispatch``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lowbit.ops.dispatch import Problem
from lowbit.ops.weight_format import Prepared


def can_run(problem: Problem) -> str | None:
    """Return ``None``: plain torch runs everywhere."""
    return None


def prepare(tensors: Prepared, overwrite: bool = False) -> Prepared:
    """Return ``tensors`` with a dense weight."""
    return tensors if tensors.weight.is_contiguous() else tensors._replace(weight=tensors.weight.contiguous())


def restore(prepared: Prepared) -> Prepared:
    """Return ``prepared``: see ``prepare``."""
    return prepared


def apply_to_rows(product: Callable[..., torch.Tensor], x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """Return ``product(rows, *arguments)`` [M, N] of the rows [M, K] of x [..., K] as [..., N]."""
    if x.ndim == 2:
        return product(x, *arguments)
    result = product(x.reshape(-1, x.shape[-1]), *arguments)
    return result.reshape(*x.shape[:-1], result.shape[-1])
