"""Int8 W8A8 on any CPU: the same integers, multiplied as float32.

For CPUs without an 8-bit dot product. Products of int8 values are exact in float32; their sum is accumulated in
float32, exactly as long as it stays below 2**24 and rounded beyond. The weight stays int8 in memory.
"""

from __future__ import annotations

import torch

from lowbit.ops import int8
from lowbit.ops.canonical import prepare, restore
from lowbit.ops.cpu import native
from lowbit.ops.cpu.blocked import multiply_float32
from lowbit.ops.cpu.quantize import quantize_int8_per_token
from lowbit.ops.dispatch import Problem
from lowbit.ops.library import define_operator
from lowbit.ops.weight_format import Prepared

__all__ = ["can_run", "linear", "prepare", "restore"]


def can_run(problem: Problem) -> str | None:
    """Return why ``problem`` can't be run, ``None`` when it can."""
    return native.dtype_refusal(problem.dtype)


@torch.no_grad()
def multiply_scaled(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply as ``lowbit.ops.int8.int8_scaled_mm`` does (same arguments), in float32."""
    output = torch.empty((x.shape[0], packed.shape[0]), dtype=out_dtype)
    bias = None if bias is None else bias.float().contiguous()

    def decode(first: int, weight: torch.Tensor) -> None:
        weight.copy_(packed[first : first + weight.shape[0]])

    multiply_float32(x.float(), packed.shape[0], decode, output, x_scale.contiguous(), weight_scale, bias)
    return output


def _fake_multiply_scaled(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], packed.shape[0]), dtype=out_dtype)


product_operator = define_operator(
    "int8_float32_scaled_mm(Tensor x, Tensor x_scale, Tensor packed, Tensor weight_scale, Tensor? bias,"
    " ScalarType out_dtype) -> Tensor",
    multiply_scaled,
    _fake_multiply_scaled,
)


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply a W8A8 linear layer: ``lowbit.ops.int8.linear``."""
    packed, weight_scale = prepared.weight, prepared.scales
    rows = x.reshape(-1, x.shape[-1])
    result: torch.Tensor
    if torch.compiler.is_compiling():
        quantized, scale = int8.quantize_int8_per_token(rows)
        result = product_operator(quantized, scale, packed, weight_scale, bias, x.dtype)
    else:
        quantized, scale = quantize_int8_per_token(rows)
        result = multiply_scaled(quantized, scale, packed, weight_scale, bias, x.dtype)
    return result.reshape(*x.shape[:-1], packed.shape[0])
