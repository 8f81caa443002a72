"""Norms with rotary embeddings, and gates, by the native helper."""

from __future__ import annotations

import torch

from lowbit.ops import elementwise as reference
from lowbit.ops.cpu import helper, native


def refusal(dtype: torch.dtype) -> str | None:
    """Return why the helper can't compute in ``dtype``, ``None`` when it can."""
    return native.dtype_refusal(dtype) if helper.available() else f"native helper {helper.refusal()}"


@torch.no_grad()
def normalize(
    x: torch.Tensor, epsilon: float | None, weight: torch.Tensor | None, frequencies: torch.Tensor | None
) -> torch.Tensor:
    """Compute ``lowbit.ops.elementwise.normalize``."""
    width = x.shape[-1]
    if refusal(x.dtype) is not None or width > native.LARGEST_NORMALIZED or x.numel() == 0:
        return reference.normalize(x, epsilon, weight, frequencies)
    reference.check_normalized(x, weight, frequencies)
    output = torch.empty(x.shape, dtype=x.dtype)
    rows = x.contiguous()
    shape = rows.shape if frequencies is not None else (1, 1, -1, width)
    native.normalize(
        rows.view(shape),
        epsilon,
        None if weight is None else weight.float().contiguous(),
        None if frequencies is None else frequencies.contiguous(),
        output.view(shape),
    )
    return output


@torch.no_grad()
def gate(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Compute ``lowbit.ops.elementwise.gate``."""
    if refusal(x.dtype) is not None or x.shape != value.shape or x.dtype != value.dtype:
        return reference.gate(x, value)
    output = torch.empty(x.shape, dtype=x.dtype)
    native.gate(x.contiguous(), value.contiguous(), output)
    return output
