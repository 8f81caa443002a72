"""4-bit weights in groups with activations left as they are, in Triton; see ``integer_groups`` for how."""

from __future__ import annotations

import torch

from lowbit.ops import w4a16
from lowbit.ops.canonical import prepare, restore
from lowbit.ops.library import register_kernel
from lowbit.ops.triton.integer_groups import FUSED_ROWS, multiply
from lowbit.ops.triton.launch import can_run
from lowbit.ops.w4a16 import operator_linear as linear

__all__ = ["can_run", "linear", "prepare", "restore", "w4a16_mm"]


def w4a16_mm(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    zero_point: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply as ``lowbit.ops.w4a16.w4a16_mm`` does, with sums in float32."""
    if x.shape[0] >= FUSED_ROWS:
        return w4a16.w4a16_mm(x, packed, weight_scale, bias, zero_point)
    return multiply(x, packed, weight_scale, bias, zero_point, w4a16.SYMMETRIC_ZERO_POINT)


for _key in ("CUDA", "XPU"):
    register_kernel("w4a16_mm", _key, w4a16_mm)
