"""Int8 W8A8 with static activations on CPUs with AVX512-VNNI: the product of ``int8_native``."""

from __future__ import annotations

import torch

from lowbit.ops.canonical import pack_weight, unpack_weight
from lowbit.ops.cpu.int8_native import ZERO_POINT, product_operator, supports
from lowbit.ops.int8_static import poisoned_rows, quantize_static

__all__ = ["linear", "pack_weight", "supports", "unpack_weight"]


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    input_scale: torch.Tensor,
    input_offset: torch.Tensor,
    quant_bias: torch.Tensor,
    deq_scale: torch.Tensor,
) -> torch.Tensor:
    """Apply a W8A8 linear layer with static activations: ``lowbit.ops.int8_static.linear``."""
    rows = x.reshape(-1, x.shape[-1])
    quantized = quantize_static(rows, input_scale, input_offset)
    codes = (quantized.nan_to_num() + ZERO_POINT).to(torch.uint8)
    bias = quant_bias.float() * deq_scale
    scale = deq_scale.unsqueeze(1)
    result: torch.Tensor = product_operator(codes, poisoned_rows(quantized), packed, scale, bias, x.dtype)
    return result.reshape(*x.shape[:-1], packed.shape[0])
