"""MX weights with activations left as they are, in plain torch: for devices that nothing else serves."""

from __future__ import annotations

import torch

from lowbit.ops.dispatch import Problem
from lowbit.ops.mx import dequantize_mx


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
    dual_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply a linear layer with an MX weight to unquantized activations; arguments as in ``lowbit.ops.mx.linear``."""
    weight = dequantize_mx(packed, weight_scale, dual_scale, x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
