"""MX weights with activations left as they are, in Triton: the weight is decoded in registers.

For chips that don't multiply MX elements.
"""

from __future__ import annotations

import torch

from lowbit.ops.canonical import prepare, restore
from lowbit.ops.dispatch import Problem
from lowbit.ops.library import register_kernel
from lowbit.ops.mx_weight_only import linear
from lowbit.ops.triton.launch import device_refusal, row_major
from lowbit.ops.triton.microscaling import PLAIN, multiply
from lowbit.ops.triton.mx import kinds

__all__ = ["can_run", "linear", "mx_weight_only_mm", "prepare", "restore"]


def can_run(problem: Problem) -> str | None:
    """Return why the kernel can't run ``problem``, or ``None``."""
    refusal = device_refusal(problem.device, problem.dtype)
    if refusal is None and problem.dtype == torch.float16:
        return "takes bfloat16 or float32: float16 has no place for the range of MX scales"
    return refusal


def mx_weight_only_mm(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dual_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``x @ weight.T + bias`` [M, N] in the dtype of x [M, K]; the weight as in ``lowbit.ops.mx.linear``."""
    outer = None if dual_scale is None else dual_scale.contiguous()
    constants = {**kinds(packed, dual_scale), "X_KIND": PLAIN.value}
    scale = weight_scale.contiguous()
    return multiply(row_major(x), None, None, packed.contiguous(), scale, outer, bias, x.dtype, constants)


for _key in ("CUDA", "XPU"):
    register_kernel("mx_weight_only_mm", _key, mx_weight_only_mm)
