"""NVFP4 weights on CPUs, with activations left as they are: no CPU multiplies e2m1.

See ``lowbit.ops.cpu.weight_only`` for how.
"""

from __future__ import annotations

import torch

from lowbit.ops import nvfp4
from lowbit.ops.canonical import prepare, restore
from lowbit.ops.cpu.fp4 import decode_fp4
from lowbit.ops.cpu.weight_only import can_run, is_fused, multiply_decoded, multiply_fused
from lowbit.ops.nvfp4_weight_only import linear

__all__ = ["can_run", "linear", "nvfp4_weight_only_mm", "prepare", "restore"]


def nvfp4_weight_only_mm(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    global_scale: torch.Tensor,
) -> torch.Tensor:
    """Return ``x @ weight.T + bias`` [M, N] in the dtype of ``x`` [M, K]; the weight as in ``ops.nvfp4.linear``."""
    if is_fused(x):
        block = (1, nvfp4.GROUP_SIZE)
        return multiply_fused(x, packed, "e2m1", weight_scale.contiguous(), bias, block, outer_scale=global_scale)

    def decode(first: int, weight: torch.Tensor) -> None:
        rows = slice(first, first + weight.shape[0])
        decode_fp4(packed[rows], weight_scale[rows].float().mul_(global_scale), weight, nvfp4.GROUP_SIZE)

    return multiply_decoded(x, packed.shape[0], decode, bias)
