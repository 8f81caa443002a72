"""What implementations share whose kernels read a checkpoint's own layout: see ``lowbit.ops.dispatch``."""

from __future__ import annotations

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
