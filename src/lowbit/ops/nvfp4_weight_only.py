"""NVFP4 weights with activations left as they are: for devices that don't multiply NVFP4 elements, and for W4A16.

The operator's reference, in plain torch, brings the weight to the activations' dtype and multiplies by torch.
"""

from __future__ import annotations

import torch

from lowbit.ops.canonical import apply_to_rows, can_run, prepare, restore
from lowbit.ops.library import define_operator, register_kernel_lazily
from lowbit.ops.nvfp4 import dequantize_nvfp4
from lowbit.ops.weight_format import Prepared

__all__ = ["can_run", "linear", "nvfp4_weight_only_mm", "prepare", "restore"]


def nvfp4_weight_only_mm(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    global_scale: torch.Tensor,
) -> torch.Tensor:
    """Return ``x @ weight.T + bias`` [M, N] in the dtype of x [M, K]; the weight as in ``lowbit.ops.nvfp4.linear``."""
    weight = dequantize_nvfp4(packed, weight_scale, global_scale, x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    global_scale: torch.Tensor,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]))


product_operator = define_operator(
    "nvfp4_weight_only_mm(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, Tensor global_scale) -> Tensor",
    nvfp4_weight_only_mm,
    _fake,
)
register_kernel_lazily("nvfp4_weight_only_mm", "CPU", "lowbit.ops.cpu.nvfp4")


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply a linear layer with an NVFP4 weight to unquantized activations.

    Arguments and result as in ``lowbit.ops.nvfp4.linear``; ``input_scale`` is not needed, as nothing is rounded.
    """
    return apply_to_rows(product_operator, x, prepared.weight, prepared.scales, bias, prepared.outer_scale)
