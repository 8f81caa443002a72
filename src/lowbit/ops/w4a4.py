"""4-bit integers on both sides: weights and activations in groups of 64 inputs with one scale each (nunchaku's int4).

The reference here defines the numbers. For a group of a row of activations::

    scale = max(absmax(x), 1e-30) / 7                   float32
    q     = clamp(round_half_even(x / scale), -7, 7)

and products are made from ``q * scale`` on both sides, accumulated in float32. A group that holds NaN or infinity gives
NaN. The weight's codes are -8 to 7 in two's complement:

================  ==============================  ============================================================
tensor            shape                           content
================  ==============================  ============================================================
weight            uint8 [N, K / 2]                input 2 * i in the lower, 2 * i + 1 in the upper half of byte i
``weight_scale``  bfloat16 or float32 [N, K / 64]
================  ==============================  ============================================================

Kernels read codes from 0 to 15 for which 8 is zero, those of ``lowbit.ops.w4a16``: ``pack_weight`` turns the upper bit
of each. What it returns is int8, so that it can be told from the checkpoint's tensor.
"""

from __future__ import annotations

import torch

from lowbit.ops.canonical import apply_to_rows, can_run
from lowbit.ops.dispatch import ANY_DEVICE, LOW_RANK, Implementation
from lowbit.ops.int8 import SMALLEST_ABSMAX
from lowbit.ops.library import define_operator
from lowbit.ops.w4a16 import dequantize_int4, quantize_int4_per_group
from lowbit.ops.weight_format import Prepared

__all__ = ["can_run", "linear", "prepare", "restore"]

GROUP_SIZE = 64
INT4_MAX = 7.0
_UPPER_BITS = 0x88

IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation(
        "weight_only",
        "lowbit.ops.w4a4_weight_only",
        ANY_DEVICE,
        slow="no 4-bit product here: weights are stored in 4 bits, products made in the activations' precision",
        is_weight_only=True,
        capabilities=LOW_RANK,
    ),
    Implementation("reference", "lowbit.ops.w4a4", ANY_DEVICE, automatic=False),
)


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a weight [N, K] (any floating dtype, finite; 64 divides K), rounding to the nearest code.

    Returns:
        Codes uint8 [N, K / 2] and scales bfloat16 [N, K / 64], absmax / 7.5 of each group.
    """
    packed, scale, _ = quantize_int4_per_group(weight, GROUP_SIZE, scale_dtype=torch.bfloat16)
    return unpack_weight(packed), scale


def dequantize_w4(weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """Return the float32 values [N, K] of codes uint8 [N, K / 2] with scales [N, K / 64]."""
    return dequantize_int4(pack_weight(weight).view(torch.uint8), weight_scale)


def round_activation(x: torch.Tensor) -> torch.Tensor:
    """Round activations to 4 bits in groups of 64.

    Args:
        x: [M, K], any floating dtype; 64 divides K.

    Returns:
        float32 [M, K]: codes times scales.
    """
    groups = x.float().unflatten(-1, (-1, GROUP_SIZE))
    scale = groups.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST_ABSMAX) / INT4_MAX
    codes = (groups / scale).round().clamp(-INT4_MAX, INT4_MAX)
    rounded: torch.Tensor = torch.where(torch.isfinite(scale), codes * scale, torch.nan).flatten(-2)
    return rounded


def w4a4_mm(
    x: torch.Tensor, packed: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Multiply activations, rounded to 4 bits, by a 4-bit weight.

    Args:
        x: [M, K] floating.
        packed: int8 [N, K / 2], from ``pack_weight``.
        weight_scale: bfloat16 or float32 [N, K / 64].
        bias: [N] or ``None``.

    Returns:
        [M, N] in ``x.dtype``.
    """
    result = round_activation(x) @ dequantize_int4(packed.view(torch.uint8), weight_scale).t()
    if bias is not None:
        result = result + bias.float()
    return result.to(x.dtype)


def _fake(x: torch.Tensor, packed: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]))


product_operator = define_operator(
    "w4a4_mm(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias) -> Tensor", w4a4_mm, _fake
)


def prepare(tensors: Prepared, overwrite: bool = False) -> Prepared:
    """Return the tensors with the weight from ``pack_weight``."""
    return tensors._replace(weight=pack_weight(tensors.weight, overwrite))


def restore(prepared: Prepared) -> Prepared:
    """Undo ``prepare``."""
    return prepared._replace(weight=unpack_weight(prepared.weight))


def pack_weight(weight: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
    """Return two's complement codes as those for which 8 is zero, dense; with ``overwrite`` in the same memory.

    Args:
        weight: uint8 [N, K / 2].
        overwrite: the memory of ``weight`` may be used.

    Returns:
        int8 [N, K / 2].
    """
    weight = weight.contiguous()
    return (weight.bitwise_xor_(_UPPER_BITS) if overwrite else weight ^ _UPPER_BITS).view(torch.int8)


def unpack_weight(packed: torch.Tensor) -> torch.Tensor:
    """Undo ``pack_weight``."""
    return packed.view(torch.uint8) ^ _UPPER_BITS


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply a W4A4 linear layer to x [..., K]; returns [..., N] in ``x.dtype``. Other arguments as of ``w4a4_mm``."""
    return apply_to_rows(product_operator, x, prepared.weight, prepared.scales, bias)
