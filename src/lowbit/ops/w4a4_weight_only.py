"""The weights of ``lowbit.ops.w4a4`` with activations left as they are, on any device: the product of ``w4a16``."""

from __future__ import annotations

import torch

from lowbit.ops.canonical import apply_to_rows, can_run
from lowbit.ops.w4a4 import prepare, restore
from lowbit.ops.w4a16 import product_operator
from lowbit.ops.weight_format import Prepared

__all__ = ["can_run", "linear", "prepare", "restore"]


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply a linear layer to unquantized activations; arguments and result as of ``lowbit.ops.w4a4.linear``."""
    return apply_to_rows(product_operator, x, prepared.weight.view(torch.uint8), prepared.scales, bias)
