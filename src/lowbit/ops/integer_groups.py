"""Integers of a few bits in groups of consecutive inputs: codes with a scale and a zero point per group.

A code c from 0 to 2**bits - 1 stands for ``(c - zero_point) * scale``, computed in float32. The families ``w4a16`` and
``w8a16`` compute with them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lowbit.ops.canonical import apply_to_rows
from lowbit.ops.weight_format import Prepared

SMALLEST_SCALE = 1e-30
GROUP_MULTIPLE = 32


def symmetric_zero_point(bits: int) -> int:
    """Return the zero point of symmetric codes, the middle of their range."""
    return 1 << (bits - 1)


def check_group_size(columns: int, group_size: int) -> None:
    """Raise ``ValueError`` unless ``group_size`` is a multiple of 32 that divides ``columns``."""
    if group_size <= 0 or group_size % GROUP_MULTIPLE or columns % group_size:
        raise ValueError(
            f"group_size {group_size} does not fit: it must be a multiple of {GROUP_MULTIPLE} that divides the"
            f" {columns} input features"
        )


def quantize_per_group(
    weight: torch.Tensor, bits: int, group_size: int, symmetric: bool, scale_dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize a weight, rounding each value to the nearest code.

    The scale is absmax / (2**bits - 1) * 2 for symmetric groups and (max - min) / (2**bits - 1) otherwise, where
    min <= 0 <= max so that zero stays zero: compressed-tensors' ``calculate_qparams``.

    Args:
        weight: [N, K], any floating dtype, finite.
        bits: 2 to 8.
        group_size: divides K.
        symmetric: the zero point is the middle of the codes.
        scale_dtype: floating; codes are to fit the scale as it is stored.

    Returns:
        Codes uint8 [N, K], scales [N, K / group_size] and zero points uint8 of the same shape.
    """
    largest = 2**bits - 1
    groups = weight.float().unflatten(1, (-1, group_size))
    low, high = groups.amin(dim=-1, keepdim=True).clamp(max=0), groups.amax(dim=-1, keepdim=True).clamp(min=0)
    extent = 2 * torch.maximum(-low, high) if symmetric else high - low
    limits = torch.finfo(scale_dtype)
    smallest = max(SMALLEST_SCALE, limits.smallest_normal * limits.eps)
    scale = (extent / largest).clamp(smallest, limits.max).to(scale_dtype)
    step = scale.float()
    middle = symmetric_zero_point(bits)
    zero = torch.full_like(step, middle) if symmetric else (-low / step).round().clamp(0, largest)
    codes = ((groups / step).round() + zero).clamp(0, largest).to(torch.uint8).flatten(1)
    return codes, scale.squeeze(-1), zero.squeeze(-1).to(torch.uint8)


def dequantize_groups(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | float) -> torch.Tensor:
    """Return the float32 weight [N, K] that codes stand for.

    Args:
        codes: integer [N, K].
        scale: floating [N, groups]; groups divides K.
        zero_point: [N, groups], or one for all.
    """
    zero = zero_point.float().unsqueeze(-1) if isinstance(zero_point, torch.Tensor) else zero_point
    groups = codes.float().unflatten(1, (scale.shape[1], -1))
    weight: torch.Tensor = ((groups - zero) * scale.float().unsqueeze(-1)).flatten(1)
    return weight


def fake_product(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    zero_point: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return an empty [M, N], the shape function of the families' products."""
    return x.new_empty((x.shape[0], packed.shape[0]))


def linear_layer(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return the ``linear`` of an implementation whose product, of the families' arguments, is ``product``."""

    def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
        """Apply a linear layer to x [..., K]; returns [..., N] in ``x.dtype``. Other arguments as of the product."""
        return apply_to_rows(product, x, prepared.weight, prepared.scales, bias, prepared.zero_point)

    return linear
