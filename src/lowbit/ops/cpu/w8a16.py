"""8-bit weights in groups with activations left as they are, on CPUs; see ``lowbit.ops.cpu.weight_only`` for how."""

from __future__ import annotations

import torch

from lowbit.ops import w8a16
from lowbit.ops.canonical import prepare, restore
from lowbit.ops.cpu import helper, native
from lowbit.ops.cpu.int8_weight_only import int8_weight_only_mm
from lowbit.ops.cpu.weight_only import can_run, is_fused, multiply_decoded, multiply_fused, takes_bfloat16
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
    if zero_point is None and weight_scale.shape[1] == 1:
        return int8_weight_only_mm(x, packed, weight_scale, bias)
    packed, weight_scale = packed.contiguous(), weight_scale.contiguous()
    group_size = x.shape[1] // weight_scale.shape[1]
    if zero_point is None and is_fused(x):
        return multiply_fused(x, packed, "int8", weight_scale, bias, (1, group_size))
    if zero_point is not None and _are_native(zero_point, group_size) and takes_bfloat16(x):
        return multiply_fused(x, packed, "int8", weight_scale, bias, (1, group_size), zero_point.contiguous())
    if zero_point is not None and helper.available() and x.shape[0] <= native.MOST_ROWS:
        return _few_rows(x, packed, weight_scale, bias, zero_point)

    def decode(first: int, weight: torch.Tensor) -> None:
        part = slice(first, first + weight.shape[0])
        zero = None if zero_point is None else zero_point[part]
        weight.copy_(w8a16.dequantize_int8_groups(packed[part], weight_scale[part], zero))

    return multiply_decoded(x, packed.shape[0], decode, bias)


def _are_native(zero_point: torch.Tensor, group_size: int) -> bool:
    return zero_point.dtype == torch.int16 and group_size % native.INT8_ZERO_COLUMNS == 0


@torch.no_grad()
def _few_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    zero_point: torch.Tensor,
) -> torch.Tensor:
    group_size = x.shape[1] // scale.shape[1]
    # In float32 the native helper knows no zero points of 8 bits; their part needs the sums of the groups alone.
    values = x.float()
    result = multiply_fused(values, weight, "int8", scale, bias, (1, group_size))
    sums = values.unflatten(1, (-1, group_size)).sum(dim=-1)
    return result.sub_(sums @ (zero_point.float() * scale).t()).to(x.dtype)
