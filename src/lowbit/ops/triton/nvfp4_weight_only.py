"""NVFP4 weights with activations left as they are, in Triton: the weight is decoded in registers.

For chips that don't multiply NVFP4 elements, and for layers whose activations are not to be quantized (W4A16).
"""

from __future__ import annotations

import torch

from lowbit.ops.canonical import prepare, restore
from lowbit.ops.library import register_kernel
from lowbit.ops.nvfp4_weight_only import linear
from lowbit.ops.triton.launch import can_run, row_major
from lowbit.ops.triton.microscaling import PLAIN, multiply
from lowbit.ops.triton.nvfp4 import KINDS

__all__ = ["can_run", "linear", "nvfp4_weight_only_mm", "prepare", "restore"]


def nvfp4_weight_only_mm(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    global_scale: torch.Tensor,
) -> torch.Tensor:
    """Return ``x @ weight.T + bias`` [M, N] in the dtype of x [M, K]; the weight as in ``lowbit.ops.nvfp4.linear``."""
    constants = {**KINDS, "X_KIND": PLAIN.value}
    outer, scale = global_scale.reshape(1, 1), weight_scale.contiguous()
    return multiply(row_major(x), None, None, packed.contiguous(), scale, outer, bias, x.dtype, constants)


for _key in ("CUDA", "XPU"):
    register_kernel("nvfp4_weight_only_mm", _key, nvfp4_weight_only_mm)
