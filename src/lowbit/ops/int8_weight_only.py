"""Int8 weights, one scale per output channel, with activations left as they are (W8A16).

The reference here defines the numbers: ``x @ (weight * weight_scale).T + bias``, the weight in the dtype of ``x``,
summed as torch sums. For layers that see few rows, such as modulation: half the bytes of 16-bit weights are read.
"""

from __future__ import annotations

import torch

from lowbit.ops.dispatch import ANY_DEVICE, Implementation, Problem
from lowbit.ops.library import define_operator, register_kernel_lazily

IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("cpu", "lowbit.ops.cpu.int8_weight_only", frozenset({"cpu"})),
    Implementation("dequantize", "lowbit.ops.int8_weight_only", ANY_DEVICE),
)


def int8_weight_only_mm(
    x: torch.Tensor, packed: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Multiply activations by an int8 weight.

    Args:
        x: [M, K] floating.
        packed: int8 [N, K].
        weight_scale: float32 [N, 1].
        bias: [N] or ``None``.

    Returns:
        [M, N] in ``x.dtype``.
    """
    weight = (packed.float() * weight_scale).to(x.dtype)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _fake(x: torch.Tensor, packed: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]))


product_operator = define_operator(
    "int8_weight_only_mm(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias) -> Tensor",
    int8_weight_only_mm,
    _fake,
)
register_kernel_lazily("int8_weight_only_mm", "CPU", "lowbit.ops.cpu.int8_weight_only")


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
    x: torch.Tensor, packed: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Apply a linear layer with int8 weights to x [..., K]; returns [..., N] in ``x.dtype``."""
    result = int8_weight_only_mm(x.reshape(-1, x.shape[-1]), packed, weight_scale, bias)
    return result.reshape(*x.shape[:-1], packed.shape[0])
