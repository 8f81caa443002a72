"""MX products with both operands quantized on chips that can't multiply them: the numbers of one that can.

They are decoded to bfloat16 in registers. To be asked for by name.
"""

from __future__ import annotations

from lowbit.ops.triton.launch import can_run
from lowbit.ops.triton.mx import linear, prepare, restore

__all__ = ["can_run", "linear", "prepare", "restore"]
