"""FP8 weights with activations left as they are: for devices that have no FP8 matrix product.

The layer's weight is brought to the activations' dtype and multiplied by torch. Slower than the original layer by the
conversion, at half its memory.
"""

from __future__ import annotations

import torch

from lowbit.ops.dispatch import Problem
from lowbit.ops.fp8 import dequantize_fp8


def supports(problem: Problem) -> str | None:
    """Return ``None``: plain torch runs everywhere."""
    return None


def pack_weight(weight: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
    """Return ``weight``: the canonical layout is read."""
    return weight


def unpack_weight(packed: torch.Tensor) -> torch.Tensor:
    """Return ``packed``: see ``pack_weight``."""
    return packed


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    input_scale: torch.Tensor | None = None,
    weight_block_size: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Apply a linear layer with FP8 weights to unquantized activations.

    Arguments and result as in ``lowbit.ops.fp8.linear``; ``input_scale`` is not needed, as nothing is rounded.
    """
    weight = dequantize_fp8(packed, weight_scale, weight_block_size, x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
