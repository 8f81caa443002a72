"""4-bit weights in groups, with activations left as they are (W4A16).

The reference here defines the numbers and the layout. A code c from 0 to 15 stands for ``(c - zero_point) * scale``,
computed in float32, where scale and zero point are those of its group of consecutive inputs of an output channel:

================  =============================  ==============================================================
tensor            shape                          content
================  =============================  ==============================================================
``packed``        uint8 [N, K / 2]               input 2 * i in the lower, 2 * i + 1 in the upper half of byte i
``weight_scale``  float32 or bfloat16 [N, K / G]  G: group size, a multiple of 32
``zero_point``    uint8 [N, K / G] or ``None``   ``None`` (symmetric) means 8
================  =============================  ==============================================================

The bytes of ``packed`` are those of compressed-tensors' ``pack-quantized`` int32 [N, K / 8] on a little-endian machine
(``pack_to_int32`` there), so a view converts one to the other.
"""

from __future__ import annotations

import torch

from lowbit.ops.canonical import can_run, prepare, restore
from lowbit.ops.dispatch import ANY_DEVICE, Implementation
from lowbit.ops.integer_groups import (
    GROUP_MULTIPLE,
    check_group_size,
    dequantize_groups,
    fake_product,
    linear_layer,
    quantize_per_group,
    symmetric_zero_point,
)
from lowbit.ops.library import define_operator, register_kernel_lazily

__all__ = ["can_run", "linear", "prepare", "restore"]

BITS = 4
LARGEST_CODE = 15
SYMMETRIC_ZERO_POINT = symmetric_zero_point(BITS)

IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("triton", "lowbit.ops.triton.w4a16", frozenset({"cuda", "xpu"}), is_weight_only=True),
    Implementation("cpu", "lowbit.ops.cpu.w4a16", frozenset({"cpu"}), is_weight_only=True),
    Implementation("dequantize", "lowbit.ops.w4a16", ANY_DEVICE, is_weight_only=True),
)


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Return codes uint8 [N, K] (0 to 15, K even) as bytes uint8 [N, K / 2], see the table above."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """Return the codes uint8 [N, K] of ``packed`` uint8 [N, K / 2]."""
    return torch.stack([packed & LARGEST_CODE, packed >> 4], dim=-1).flatten(-2)


def quantize_int4_per_group(
    weight: torch.Tensor, group_size: int, symmetric: bool = True, scale_dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize a weight, rounding each value to the nearest code.

    The scale is absmax / 7.5 for symmetric groups and (max - min) / 15 otherwise, see ``integer_groups``.

    Args:
        weight: [N, K], any floating dtype, finite.
        group_size: a multiple of 32 that divides K.
        symmetric: no zero points.
        scale_dtype: float32 or bfloat16.

    Returns:
        ``packed``, ``weight_scale`` and ``zero_point``, see the table above.

    Raises:
        ValueError: ``group_size`` does not fit.
    """
    check_group_size(weight.shape[1], group_size)
    codes, scale, zero = quantize_per_group(weight, BITS, group_size, symmetric, scale_dtype)
    return pack_int4(codes), scale, None if symmetric else zero


def dequantize_int4(
    packed: torch.Tensor, weight_scale: torch.Tensor, zero_point: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the float32 weight [N, K] that the tensors stand for."""
    zero = SYMMETRIC_ZERO_POINT if zero_point is None else zero_point
    return dequantize_groups(unpack_int4(packed), weight_scale, zero)


def split_pairs(x: torch.Tensor) -> torch.Tensor:
    """Return x [M, K] with the even ones of each 32 columns before the odd ones: the order that bytes decode to."""
    split: torch.Tensor = x.unflatten(1, (-1, GROUP_MULTIPLE // 2, 2)).transpose(2, 3).flatten(1)
    return split


def w4a16_mm(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    zero_point: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply activations by a 4-bit weight.

    Args:
        x: [M, K] floating.
        packed: uint8 [N, K / 2].
        weight_scale: float32 or bfloat16 [N, K / G].
        bias: [N] or ``None``.
        zero_point: uint8 [N, K / G] or ``None``.

    Returns:
        [M, N] in ``x.dtype``.
    """
    weight = dequantize_int4(packed, weight_scale, zero_point).to(x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


product_operator = define_operator(
    "w4a16_mm(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, Tensor? zero_point=None) -> Tensor",
    w4a16_mm,
    fake_product,
)
register_kernel_lazily("w4a16_mm", "CPU", "lowbit.ops.cpu.w4a16")

linear = linear_layer(w4a16_mm)
operator_linear = linear_layer(product_operator)  # the kernel that is registered for the device
