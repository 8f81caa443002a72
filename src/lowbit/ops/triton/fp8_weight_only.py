"""E4m3 weights with activations left as they are, in Triton: decoded in the kernel, so on chips without FP8 too."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lowbit.ops import fp8_weight_only as plain
from lowbit.ops.canonical import prepare, restore
from lowbit.ops.dispatch import Problem
from lowbit.ops.fp8_weight_only import linear
from lowbit.ops.library import register_kernel
from lowbit.ops.triton.int8_weight_only import MOST_ROWS, weight_only_mm
from lowbit.ops.triton.launch import device_refusal

__all__ = ["can_run", "fp8_weight_only_mm", "linear", "prepare", "restore"]


def fp8_weight_only_mm(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    weight_block_size: Sequence[int] | None = None,
) -> torch.Tensor:
    """Multiply as ``lowbit.ops.fp8_weight_only.fp8_weight_only_mm`` does; its own kernel takes a scale per channel."""
    if x.shape[0] > MOST_ROWS or weight_scale.shape != (packed.shape[0], 1):
        return plain.fp8_weight_only_mm(x, packed, weight_scale, bias, weight_block_size)
    return weight_only_mm(x, packed.view(torch.uint8), weight_scale, bias)


for _key in ("CUDA", "XPU"):
    register_kernel("fp8_weight_only_mm", _key, fp8_weight_only_mm)


def can_run(problem: Problem) -> str | None:
    """Return why the kernel here can't run ``problem``, or ``None``."""
    if problem.format.block is not None:
        return "takes one scale per output channel, not weight blocks"
    return device_refusal(problem.device, problem.dtype)
