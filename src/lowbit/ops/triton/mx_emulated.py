"""MX products with both operands quantized on chips that can't multiply them: the numbers of one that can.

They are decoded to bfloat16 in registers. To be asked for by name.
"""

from __future__ import annotations

from lowbit.ops.triton.launch import supports
from lowbit.ops.triton.mx import linear, pack_weight, unpack_weight

__all__ = ["linear", "pack_weight", "supports", "unpack_weight"]
