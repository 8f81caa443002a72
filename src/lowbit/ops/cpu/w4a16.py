"""4-bit weights with activations left as they are, on CPUs; see ``lowbit.ops.cpu.weight_only`` for how."""

from __future__ import annotations

import torch

from lowbit.ops import w4a16
from lowbit.ops.canonical import prepare, restore
from lowbit.ops.cpu import helper, native
from lowbit.ops.cpu.weight_only import can_run, is_fused, multiply_decoded, multiply_fused
from lowbit.ops.cpu.workspace import scratch
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
    packed, weight_scale = packed.contiguous(), weight_scale.contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    group_size = x.shape[1] // weight_scale.shape[1]
    is_native = helper.available() and x.numel() > 0
    if is_native and is_fused(x):
        return multiply_fused(x, packed, "int4", weight_scale, bias, (1, group_size), zero_point)
    if is_native:
        x = w4a16.split_pairs(x)

    def decode(first: int, weight: torch.Tensor) -> None:
        part = slice(first, first + weight.shape[0])
        zero = None if zero_point is None else zero_point[part]
        if is_native:
            _decode_split(packed[part], weight_scale[part], zero, group_size, weight)
        else:
            weight.copy_(w4a16.dequantize_int4(packed[part], weight_scale[part], zero))

    return multiply_decoded(x, packed.shape[0], decode, bias)


def _decode_split(
    packed: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, group_size: int, weight: torch.Tensor
) -> None:
    is_float32 = weight.dtype == torch.float32
    decoded = weight if is_float32 else scratch("decoded_int4", tuple(weight.shape), torch.float32)
    native.decode_int4(packed, scale, zero_point, group_size, decoded)
    if not is_float32:
        weight.copy_(decoded)
