"""8-bit weights in groups, with activations left as they are (W8A16).

The reference here defines the numbers and the layout. A weight w stands for ``(w - zero_point) * scale``, computed in
float32, where scale and zero point are those of its group of consecutive inputs of an output channel:

================  =====================  =================================================================
tensor            shape                  content
================  =====================  =================================================================
``packed``        int8 [N, K]
``weight_scale``  float32 [N, K / G]     G: group size, a divisor of K; K: one scale per output channel
``zero_point``    [N, K / G] or ``None``  int16 or float32; ``None`` means 0
================  =====================  =================================================================

Codes from 0 to 255, as GPTQ and AWQ count them, are 128 larger, and so are their zero points.
"""

from __future__ import annotations

import torch

from lowbit.ops.canonical import can_run, prepare, restore
from lowbit.ops.dispatch import ANY_DEVICE, Implementation
from lowbit.ops.integer_groups import dequantize_groups, fake_product, linear_layer
from lowbit.ops.library import define_operator, register_kernel_lazily

__all__ = ["can_run", "linear", "prepare", "restore"]

CODE_OFFSET = 128

IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("triton", "lowbit.ops.triton.w8a16", frozenset({"cuda", "xpu"}), is_weight_only=True),
    Implementation("cpu", "lowbit.ops.cpu.w8a16", frozenset({"cpu"}), is_weight_only=True),
    Implementation("dequantize", "lowbit.ops.w8a16", ANY_DEVICE, is_weight_only=True),
)


def dequantize_int8_groups(
    packed: torch.Tensor, weight_scale: torch.Tensor, zero_point: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the float32 weight [N, K] that the tensors stand for, see the table above."""
    return dequantize_groups(packed, weight_scale, 0.0 if zero_point is None else zero_point)


def w8a16_mm(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    zero_point: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply activations by an 8-bit weight.

    Args:
        x: [M, K] floating.
        packed: int8 [N, K].
        weight_scale: float32 [N, K / G].
        bias: [N] or ``None``.
        zero_point: int16 or float32 [N, K / G] or ``None``.

    Returns:
        [M, N] in ``x.dtype``.
    """
    weight = dequantize_int8_groups(packed, weight_scale, zero_point).to(x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


product_operator = define_operator(
    "w8a16_mm(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, Tensor? zero_point=None) -> Tensor",
    w8a16_mm,
    fake_product,
)
register_kernel_lazily("w8a16_mm", "CPU", "lowbit.ops.cpu.w8a16")

linear = linear_layer(w8a16_mm)
operator_linear = linear_layer(product_operator)  # the kernel that is registered for the device
