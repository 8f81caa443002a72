"""The weights of ``lowbit.ops.w4a4`` with activations left as they are, on any device: the product of ``w4a16``."""

from __future__ import annotations

import torch

from lowbit.ops.canonical import apply_to_rows, supports
from lowbit.ops.w4a4 import pack_weight, unpack_weight
from lowbit.ops.w4a16 import product_operator

__all__ = ["linear", "pack_weight", "supports", "unpack_weight"]


def linear(
    x: torch.Tensor, packed: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Apply a linear layer to unquantized activations; arguments and result as of ``lowbit.ops.w4a4.linear``."""
    return apply_to_rows(product_operator, x, packed.view(torch.uint8), weight_scale, bias)
