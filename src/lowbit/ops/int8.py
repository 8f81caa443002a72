"""Int8 W8A8: symmetric, weights scaled per output channel, activations per token.

The reference here defines the numbers. Quantizing a row ``x`` of K values::

    scale = max(absmax(x), 1e-30) / 127          float32
    q     = clamp(round_half_even(x / scale), -127, 127)

so that zero rows need no special case, and a NaN or an infinity in a row gives NaN in that row of the result.
The product accumulates in int32 and is scaled in float32.
"""

from __future__ import annotations

import torch

from lowbit.ops.canonical import can_run, prepare, restore
from lowbit.ops.dispatch import ANY_DEVICE, Implementation
from lowbit.ops.library import define_operator, register_kernel_lazily
from lowbit.ops.weight_format import Prepared

__all__ = ["can_run", "linear", "prepare", "restore"]

INT8_MAX = 127.0
SMALLEST_ABSMAX = 1e-30

IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("triton", "lowbit.ops.triton.int8", frozenset({"cuda", "xpu"}), capabilities=frozenset({"joint"})),
    Implementation(
        "native", "lowbit.ops.cpu.int8_native", frozenset({"cpu"}), capabilities=frozenset({"joint", "gated"})
    ),
    Implementation("onednn", "lowbit.ops.cpu.int8_onednn", frozenset({"cpu"})),
    Implementation(
        "float32",
        "lowbit.ops.cpu.int8_float32",
        frozenset({"cpu"}),
        slow="this CPU has no 8-bit dot product, so products are made in float32: memory is saved, time is not",
    ),
    Implementation(
        "reference", "lowbit.ops.int8", ANY_DEVICE, slow="the reference computes in float64 and is slow everywhere"
    ),
    # Another definition of the numbers: activations are not rounded. For layers that see few rows.
    Implementation(
        "weight_only",
        "lowbit.ops.triton.int8_weight_only",
        frozenset({"cuda", "xpu"}),
        automatic=False,
        is_weight_only=True,
    ),
    Implementation("weight_only", "lowbit.ops.int8_weight_only", ANY_DEVICE, automatic=False, is_weight_only=True),
)


def quantize_int8_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row of ``x`` symmetrically to int8.

    Args:
        x: [..., K], any floating dtype.

    Returns:
        int8 [..., K] and float32 scales [..., 1]. A row with NaN or infinity is all zeros with a scale that is not
        finite.
    """
    values = x.float()
    absmax = values.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST_ABSMAX)
    scale = absmax / INT8_MAX
    quantized = (values / scale).round().clamp(-INT8_MAX, INT8_MAX)
    finite = torch.isfinite(absmax)
    return torch.where(finite, quantized, 0.0).to(torch.int8), scale


def dequantize_int8(weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """Decode a weight: ``weight * weight_scale``, rounded once.

    Args:
        weight: int8 [N, K].
        weight_scale: float32 [N, 1], or [] for the whole weight.

    Returns:
        float32 [N, K].
    """
    return weight.float() * weight_scale


def int8_scaled_mm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply two int8 matrices and scale the result.

    Args:
        x: int8 [M, K].
        x_scale: float32 [M, 1].
        weight: int8 [N, K].
        weight_scale: float32 [N, 1].
        bias: [N] or ``None``.
        out_dtype: of the result.

    Returns:
        ``x @ weight.T * x_scale * weight_scale.T + bias``, [M, N] in ``out_dtype``; computed in float32 from the exact
        integer product.
    """
    # float64 holds every product of int8 matrices with K < 2**39 exactly, on every device torch has.
    accumulator = (x.double() @ weight.double().t()).float()
    result = accumulator * x_scale * weight_scale.t()
    if bias is not None:
        result = result + bias.float()
    return result.to(out_dtype)


def _fake_quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(x, dtype=torch.int8, memory_format=torch.contiguous_format),
        x.new_empty((*x.shape[:-1], 1), dtype=torch.float32),
    )


def _fake_scaled_mm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=out_dtype)


quantize_operator = define_operator(
    "quantize_int8_per_token(Tensor x) -> (Tensor, Tensor)", quantize_int8_per_token, _fake_quantize
)
scaled_mm_operator = define_operator(
    "int8_scaled_mm(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, ScalarType out_dtype)"
    " -> Tensor",
    int8_scaled_mm,
    _fake_scaled_mm,
)
register_kernel_lazily("quantize_int8_per_token", "CPU", "lowbit.ops.cpu.quantize")


def quantize_activation(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize activations: as an operator in eager mode, as plain torch when compiling, so that it fuses."""
    if torch.compiler.is_compiling():
        return quantize_int8_per_token(x)
    quantized, scale = quantize_operator(x)
    return quantized, scale


# The reference as an implementation of the family.


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply a W8A8 linear layer.

    Args:
        x: [..., K] floating.
        prepared: ``weight`` int8 [N, K], ``scale`` float32 [N, 1].
        bias: [N] or ``None``.

    Returns:
        [..., N] in ``x.dtype``.
    """
    packed, weight_scale = prepared.weight, prepared.scales
    quantized, scale = quantize_int8_per_token(x.reshape(-1, x.shape[-1]))
    result = int8_scaled_mm(quantized, scale, packed, weight_scale, bias, x.dtype)
    return result.reshape(*x.shape[:-1], packed.shape[0])
