"""NVFP4 weights with activations left as they are, in plain torch: for devices that nothing else serves."""

from __future__ import annotations

import torch

from lowbit.ops.dispatch import Problem
from lowbit.ops.nvfp4 import dequantize_nvfp4


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
    global_scale: torch.Tensor,
    input_scale: torch.Tensor | None = None,
    weight_only: bool = False,
) -> torch.Tensor:
    """Apply a linear layer with an NVFP4 weight to unquantized activations.

    Arguments and result as in ``lowbit.ops.nvfp4.linear``; ``input_scale`` is not needed, as nothing is rounded.
    """
    weight = dequantize_nvfp4(packed, weight_scale, global_scale, x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
