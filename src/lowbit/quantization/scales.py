"""Bringing the scales of checkpoints to the shapes that the methods hold, and refusing those that make no sense."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from lowbit.errors import CheckpointError
from lowbit.ops.mx import NAN_CODE

if TYPE_CHECKING:
    from lowbit.quantization.linear import QuantizedLinear

# Values that are quantized together: what fits the cache on CPUs, what bounds the memory on others.
ELEMENTS_AT_ONCE = {"cpu": 1 << 17}
ELEMENTS_AT_ONCE_ELSEWHERE = 1 << 24


def per_channel_scale(scale: torch.Tensor, out_features: int) -> torch.Tensor:
    """Return a scale as float32 [N, 1] where its shape says so: from [N, 1], [N], [1] or []; else unchanged."""
    if scale.is_floating_point() and scale.dtype != torch.float32:
        scale = scale.float()
    if scale.shape == (out_features,):
        return scale.reshape(out_features, 1)
    if scale.numel() == 1 and out_features != 1:
        return scale.reshape(1, 1).expand(out_features, 1).contiguous()
    return scale.reshape(1, 1) if scale.numel() == 1 else scale


def per_tensor_scale(scale: torch.Tensor) -> torch.Tensor:
    """Return a scale of one element as float32 []; else unchanged."""
    return scale.float().reshape(()) if scale.numel() == 1 else scale


def finite_and_positive(layer: QuantizedLinear, name: str, scale: torch.Tensor) -> torch.Tensor:
    """Return ``scale``, a tensor ``name`` of ``layer``, if all of it is finite and above zero.

    Raises:
        CheckpointError: it is not; names the tensor, how many values are wrong and the first.
    """
    if scale.is_meta:
        return scale
    values = scale.float()
    wrong = ~(torch.isfinite(values) & (values > 0))
    _refuse(layer, name, wrong, scale, "must be finite and above zero")
    return scale


def finite(layer: QuantizedLinear, name: str, scale: torch.Tensor) -> torch.Tensor:
    """Return ``scale``, a tensor ``name`` of ``layer``, if all of it is finite; AutoRound's may be negative.

    Raises:
        CheckpointError: it is not; see ``finite_and_positive``.
    """
    if not scale.is_meta:
        _refuse(layer, name, ~torch.isfinite(scale), scale, "must be finite")
    return scale


def exponents(layer: QuantizedLinear, name: str, scale: torch.Tensor) -> torch.Tensor:
    """Return E8M0 scales as uint8 where they come as ``float8_e8m0fnu``; else unchanged.

    Raises:
        CheckpointError: some are NaN.
    """
    if scale.dtype == torch.float8_e8m0fnu:
        scale = scale.view(torch.uint8)
    if scale.dtype == torch.uint8 and not scale.is_meta:
        _refuse(layer, name, scale == NAN_CODE, scale, "must not be NaN (E8M0 code 255)")
    return scale


def _refuse(layer: QuantizedLinear, name: str, wrong: torch.Tensor, scale: torch.Tensor, rule: str) -> None:
    count = int(wrong.sum())
    if count:
        first = scale[wrong].flatten()[0].float().item()
        raise CheckpointError(
            f"{layer.prefix}.{layer.stored_name(name)}: {count} of {scale.numel()} values {rule}; the first is {first}"
        )


def quantize_by_rows(
    weight: torch.Tensor, quantize: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
) -> tuple[torch.Tensor, ...]:
    """Quantize a weight [N, K] a few rows at a time, so that what is made on the way stays small.

    Args:
        weight: of any floating dtype.
        quantize: rows [n, K] to tensors of n rows each, whatever the other rows are.

    Returns:
        The tensors with N rows.
    """
    at_once = ELEMENTS_AT_ONCE.get(weight.device.type, ELEMENTS_AT_ONCE_ELSEWHERE)
    step = max(at_once // max(weight.shape[1], 1), 1)
    first = quantize(weight[:step])
    whole = tuple(part.new_empty((weight.shape[0], *part.shape[1:])) for part in first)
    for start in range(0, weight.shape[0], step):
        parts = first if start == 0 else quantize(weight[start : start + step])
        for target, part in zip(whole, parts, strict=True):
            target[start : start + step] = part
    return whole
