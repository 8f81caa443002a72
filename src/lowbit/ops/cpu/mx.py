"""MX weights on CPUs, with activations left as they are: no CPU multiplies MX elements.

See ``lowbit.ops.cpu.weight_only`` for how.
"""

from __future__ import annotations

import torch

from lowbit.ops import mx
from lowbit.ops.canonical import prepare, restore
from lowbit.ops.cpu import helper, native
from lowbit.ops.cpu.fp4 import decode_fp4
from lowbit.ops.cpu.weight_only import can_run, is_fused, multiply_decoded, multiply_fused
from lowbit.ops.fp8 import E4M3
from lowbit.ops.mx_weight_only import linear

__all__ = ["can_run", "linear", "mx_weight_only_mm", "prepare", "restore"]


def decode_rows(
    packed: torch.Tensor, scale: torch.Tensor, dual_scale: torch.Tensor | None, first: int, output: torch.Tensor
) -> None:
    """Write the values of rows of a weight, from ``first`` on, to ``output``.

    Args:
        packed: e4m3 [N, K] or e2m1 uint8 [N, K / 2], dense.
        scale: E8M0 uint8 [N, ceil(K / 32)].
        dual_scale: float32 [N, ceil(K / 512)] or ``None``.
        first: the first row.
        output: dense [rows, K] float32, bfloat16 or float16.
    """
    rows = slice(first, first + output.shape[0])
    group_scale = mx.decode_e8m0(scale[rows])
    if dual_scale is not None:
        # A power of two times the other: exact, as the reference's two products are.
        per_dual = mx.DUAL_GROUP_SIZE // mx.GROUP_SIZE
        group_scale *= mx.expand_groups(dual_scale[rows], per_dual, group_scale.shape[1])
    if packed.dtype != E4M3:
        decode_fp4(packed[rows], group_scale, output, mx.GROUP_SIZE)
    elif helper.available():
        native.dequantize(packed[rows], group_scale, output, 1, mx.GROUP_SIZE)
    else:
        output.copy_(packed[rows].float().mul_(mx.expand_groups(group_scale, mx.GROUP_SIZE, output.shape[1])))


def mx_weight_only_mm(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dual_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``x @ weight.T + bias`` [M, N] in the dtype of ``x`` [M, K], for a weight as ``decode_rows`` takes it."""
    weight_type = "e4m3" if packed.dtype == E4M3 else "e2m1"
    if is_fused(x):
        outer, columns = (None, 0) if dual_scale is None else (dual_scale.contiguous(), mx.DUAL_GROUP_SIZE)
        scale, block = weight_scale.contiguous(), (1, mx.GROUP_SIZE)
        return multiply_fused(x, packed, weight_type, scale, bias, block, outer_scale=outer, outer_columns=columns)

    def decode(first: int, weight: torch.Tensor) -> None:
        decode_rows(packed, weight_scale, dual_scale, first, weight)

    return multiply_decoded(x, packed.shape[0], decode, bias)
