"""FP8 weights on CPUs, with activations left as they are: no CPU multiplies e4m3.

See ``lowbit.ops.cpu.weight_only`` for how.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lowbit.ops import fp8
from lowbit.ops.canonical import prepare, restore
from lowbit.ops.cpu import helper, native
from lowbit.ops.cpu.weight_only import can_run, is_fused, multiply_decoded, multiply_fused
from lowbit.ops.fp8_weight_only import linear

__all__ = ["can_run", "fp8_weight_only_mm", "linear", "prepare", "restore"]


def decode_rows(
    packed: torch.Tensor, scale: torch.Tensor, block_size: Sequence[int] | None, first: int, output: torch.Tensor
) -> None:
    """Write rows of ``packed`` times ``scale``, from ``first`` on, to ``output``.

    Args:
        packed: e4m3 [N, K].
        scale: float32: per tensor, [N, 1], or per block.
        block_size: (rows, columns) of a block, ``None`` for the other two.
        first: the first row.
        output: dense [rows, K] float32, bfloat16 or float16.
    """
    rows, columns = output.shape
    codes = packed[first : first + rows]
    if helper.available():
        native.dequantize(codes, scale, output, *_block(packed, scale, block_size), first)
        return
    if block_size is not None:
        top = first // block_size[0]
        skipped = first - top * block_size[0]
        grid = scale[top : -(-(first + rows) // block_size[0])]
        scale = fp8.expand_scale(grid, torch.Size((skipped + rows, columns)), block_size)[skipped:]
    elif scale.numel() > 1:
        scale = scale[first : first + rows]
    output.copy_(codes.float().mul_(scale))


def _block(packed: torch.Tensor, scale: torch.Tensor, block_size: Sequence[int] | None) -> tuple[int, int]:
    """Return the rows and columns of the weight that share a scale."""
    if block_size is not None:
        return block_size[0], block_size[1]
    return packed.shape[0] if scale.numel() == 1 else 1, packed.shape[1]


def fp8_weight_only_mm(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    weight_block_size: Sequence[int] | None = None,
) -> torch.Tensor:
    """Return ``x @ (packed * weight_scale).T + bias`` [M, N] in the dtype of ``x`` [M, K]."""
    weight_scale = weight_scale.contiguous()
    if is_fused(x):
        return multiply_fused(x, packed, "e4m3", weight_scale, bias, _block(packed, weight_scale, weight_block_size))

    def decode(first: int, weight: torch.Tensor) -> None:
        decode_rows(packed, weight_scale, weight_block_size, first, weight)

    return multiply_decoded(x, packed.shape[0], decode, bias)
