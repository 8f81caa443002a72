"""FP8 weights with activations left as they are: for devices that have no FP8 matrix product.

The operator's reference brings the weight to the activations' dtype and multiplies by torch: slower than the original
layer by the conversion, at half its memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lowbit.ops.canonical import apply_to_rows, can_run, prepare, restore
from lowbit.ops.fp8 import dequantize_fp8
from lowbit.ops.library import define_operator, register_kernel_lazily
from lowbit.ops.weight_format import Prepared

__all__ = ["can_run", "fp8_weight_only_mm", "linear", "prepare", "restore"]


def fp8_weight_only_mm(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    weight_block_size: Sequence[int] | None = None,
) -> torch.Tensor:
    """Return ``x @ (packed * weight_scale).T + bias`` [M, N] in the dtype of ``x`` [M, K].

    Weight, scale and blocks as in ``lowbit.ops.fp8.linear``.
    """
    block = None if weight_block_size is None else (weight_block_size[0], weight_block_size[1])
    weight = dequantize_fp8(packed, weight_scale, block, x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    weight_block_size: Sequence[int] | None = None,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]))


product_operator = define_operator(
    "fp8_weight_only_mm(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, int[]? weight_block_size=None)"
    " -> Tensor",
    fp8_weight_only_mm,
    _fake,
)
register_kernel_lazily("fp8_weight_only_mm", "CPU", "lowbit.ops.cpu.fp8")


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply a linear layer with FP8 weights to unquantized activations.

    Arguments and result as in ``lowbit.ops.fp8.linear``; ``input_scale`` is not needed, as nothing is rounded.
    """
    block = None if prepared.format.block is None else list(prepared.format.block)
    return apply_to_rows(product_operator, x, prepared.weight, prepared.scales, bias, block)
