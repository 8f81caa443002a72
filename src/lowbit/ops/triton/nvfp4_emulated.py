"""NVFP4 products with both operands quantized on chips that can't multiply them: the numbers of one that can.

They are decoded to bfloat16 in registers. To be asked for by name.
"""

from __future__ import annotations

from lowbit.ops.dispatch import Problem
from lowbit.ops.triton.launch import device_refusal
from lowbit.ops.triton.nvfp4 import linear, only_weights, prepare, restore

__all__ = ["can_run", "linear", "prepare", "restore"]


def can_run(problem: Problem) -> str | None:
    """Return why the kernels here can't run ``problem``, or ``None``."""
    return device_refusal(problem.device, problem.dtype) or only_weights(problem)
