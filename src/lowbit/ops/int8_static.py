"""Int8 W8A8 with one scale and offset for all activations, known beforehand (msModelSlim's W8A8).

The reference here defines the numbers. With ``s`` the input's scale and ``o`` its offset::

    q = clamp(round_half_even(x / s) + o, -128, 127)
    y = (q W^T + quant_bias) * deq_scale

``quant_bias`` int32 holds the layer's bias and what the offset adds: ``round(bias / deq_scale - sum_k W o)``. The
integer product is exact; it and ``quant_bias`` are scaled in float32, one after the other.
"""

from __future__ import annotations

import torch

from lowbit.ops import int8
from lowbit.ops.canonical import can_run, prepare, restore
from lowbit.ops.dispatch import ANY_DEVICE, Implementation
from lowbit.ops.weight_format import Prepared

__all__ = ["can_run", "linear", "prepare", "restore"]

SMALLEST, LARGEST = -128, 127

IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("native", "lowbit.ops.cpu.int8_static", frozenset({"cpu"})),
    Implementation("reference", "lowbit.ops.int8_static", ANY_DEVICE),
)


def quantize_static(x: torch.Tensor, input_scale: torch.Tensor, input_offset: torch.Tensor) -> torch.Tensor:
    """Return ``q`` of the module's formula: whole numbers in float32, of the shape of ``x``; NaN stays NaN.

    Args:
        x: floating.
        input_scale: float32, one element.
        input_offset: float32, one element, a whole number.
    """
    return ((x.float() / input_scale).round() + input_offset).clamp(SMALLEST, LARGEST)


def bits_to_scale(deq_scale: torch.Tensor) -> torch.Tensor:
    """Return a ``deq_scale`` that holds the bits of float32 numbers in int64, as msModelSlim's for float16 models."""
    return deq_scale.to(torch.int32).view(torch.float32)


def dequantize_int8_static(weight: torch.Tensor, deq_scale: torch.Tensor, input_scale: torch.Tensor) -> torch.Tensor:
    """Decode a weight: ``weight * (deq_scale / input_scale)``.

    Args:
        weight: int8 [N, K].
        deq_scale: float32 [N], the input's scale times the weight's.
        input_scale: float32, one element.

    Returns:
        float32 [N, K].
    """
    return int8.dequantize_int8(weight, (deq_scale / input_scale).unsqueeze(1))


def bias_of(
    weight: torch.Tensor, input_offset: torch.Tensor, quant_bias: torch.Tensor, deq_scale: torch.Tensor
) -> torch.Tensor:
    """Return the float32 bias [N] that ``quant_bias`` [N] holds, of an int8 weight [N, K]."""
    sums = weight.sum(dim=1, dtype=torch.int64).double()
    return ((quant_bias.double() + sums * input_offset.double()) * deq_scale.double()).float()


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply a W8A8 linear layer with static activations.

    Args:
        x: [..., K] floating; a row with NaN or infinity gives NaN or what clamping makes of it.
        prepared: ``weight`` int8 [N, K]; ``scale`` float32 [N], msModelSlim's ``deq_scale``; ``input_scale`` and
            ``input_offset`` float32 []; ``quant_bias`` int32 [N].
        bias: not added: ``quant_bias`` holds it.

    Returns:
        [..., N] in ``x.dtype``.
    """
    packed, deq_scale = prepared.weight, prepared.scales
    input_scale, input_offset, quant_bias = prepared.static_activations
    rows = x.reshape(-1, x.shape[-1])
    quantized = quantize_static(rows, input_scale, input_offset)
    row_scale = poisoned_rows(quantized)
    codes = quantized.nan_to_num().to(torch.int8)
    summand = quant_bias.float() * deq_scale
    result: torch.Tensor = int8.scaled_mm_operator(codes, row_scale, packed, deq_scale.unsqueeze(1), summand, x.dtype)
    return result.reshape(*x.shape[:-1], packed.shape[0])


def poisoned_rows(quantized: torch.Tensor) -> torch.Tensor:
    """Return a scale [M, 1] of one for each row, NaN for those with NaN."""
    return torch.where(quantized.isnan().any(dim=1, keepdim=True), torch.nan, 1.0).float()
