"""Int8 weights with activations left as they are (W8A16), for layers that see few rows.

The reference here defines the numbers: the product of the activations and the integers, accumulated in float32, times
the output channel's scale, plus the bias, rounded once to the activations' dtype. A modulation layer sees one row per
image: it reads its weight and does little else, so that half the bytes are half the time, and nothing of the
activations is rounded.
"""

from __future__ import annotations

import torch

from lowbit.ops.canonical import apply_to_rows, can_run, prepare, restore
from lowbit.ops.library import define_operator, register_kernel_lazily
from lowbit.ops.weight_format import Prepared

__all__ = ["can_run", "linear", "prepare", "restore"]


def int8_weight_only_mm(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Multiply floating activations by int8 weights.

    Args:
        x: [M, K], float32, bfloat16 or float16.
        weight: int8 [N, K].
        weight_scale: float32 [N, 1].
        bias: [N] or ``None``.

    Returns:
        ``x @ weight.T * weight_scale.T + bias``, [M, N] in ``x.dtype``; computed in float32.
    """
    result = x.float() @ weight.float().t() * weight_scale.t()
    if bias is not None:
        result = result + bias.float()
    return result.to(x.dtype)


def _fake(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


product_operator = define_operator(
    "int8_weight_only_mm(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias) -> Tensor",
    int8_weight_only_mm,
    _fake,
)
register_kernel_lazily("int8_weight_only_mm", "CPU", "lowbit.ops.cpu.int8_weight_only")


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply a linear layer with int8 weights to unquantized activations.

    Arguments and result as in ``lowbit.ops.int8.linear``.
    """
    return apply_to_rows(product_operator, x, prepared.weight, prepared.scales, bias)
