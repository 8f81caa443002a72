"""Decoding e2m1 on CPUs: the native helper when it is there, else a table."""

from __future__ import annotations

import torch

from lowbit.ops.cpu import helper, native
from lowbit.ops.e2m1 import decode_e2m1_pairs
from lowbit.ops.mx import expand_groups


def decode_fp4(packed: torch.Tensor, scale: torch.Tensor, output: torch.Tensor, group_size: int) -> None:
    """Write the values of e2m1 codes times their groups' scales to ``output``.

    Args:
        packed: dense uint8 [rows, K / 2], the even column in the low nibble.
        scale: dense float32 [rows, ceil(K / group_size)].
        output: written: dense [rows, K] float32, bfloat16 or float16.
        group_size: columns of a group, even.
    """
    if helper.available():
        native.decode_fp4(packed, scale, output, group_size)
        return
    values = decode_e2m1_pairs(packed).flatten(-2)
    output.copy_(values.mul_(expand_groups(scale, group_size, output.shape[1])))
