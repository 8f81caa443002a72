"""8-bit weights in groups with activations left as they are, in Triton; see ``integer_groups`` for how."""

from __future__ import annotations

import torch

from lowbit.ops import w8a16
from lowbit.ops.canonical import prepare, restore
from lowbit.ops.library import register_kernel
from lowbit.ops.triton.integer_groups import FUSED_ROWS, multiply
from lowbit.ops.triton.launch import can_run
from lowbit.ops.w8a16 import operator_linear as linear

__all__ = ["can_run", "linear", "prepare", "restore", "w8a16_mm"]


def w8a16_mm(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    zero_point: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply as ``lowbit.ops.w8a16.w8a16_mm`` does, with sums in float32."""
    if x.shape[0] >= FUSED_ROWS:
        return w8a16.w8a16_mm(x, packed, weight_scale, bias, zero_point)
    return multiply(x, packed, weight_scale, bias, zero_point, 0)


for _key in ("CUDA", "XPU"):
    register_kernel("w8a16_mm", _key, w8a16_mm)
