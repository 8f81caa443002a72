"""MX weights with activations left as they are: for devices that don't multiply MX elements.

The operator's reference, in plain torch, brings the weight to the activations' dtype and multiplies by torch.
"""

from __future__ import annotations

import torch

from lowbit.ops.canonical import apply_to_rows, can_run, prepare, restore
from lowbit.ops.library import define_operator, register_kernel_lazily
from lowbit.ops.mx import dequantize_mx
from lowbit.ops.weight_format import Prepared

__all__ = ["can_run", "linear", "mx_weight_only_mm", "prepare", "restore"]


def mx_weight_only_mm(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dual_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ``x @ weight.T + bias`` [M, N] in the dtype of ``x`` [M, K]; the weight as in ``lowbit.ops.mx.linear``."""
    weight = dequantize_mx(packed, weight_scale, dual_scale, x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dual_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]))


product_operator = define_operator(
    "mx_weight_only_mm(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, Tensor? dual_scale=None) -> Tensor",
    mx_weight_only_mm,
    _fake,
)
register_kernel_lazily("mx_weight_only_mm", "CPU", "lowbit.ops.cpu.mx")


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply a linear layer with an MX weight to unquantized activations; arguments as in ``lowbit.ops.mx.linear``."""
    return apply_to_rows(product_operator, x, prepared.weight, prepared.scales, bias, prepared.outer_scale)
