"""Int8 W8A8 with static activations on CPUs with AVX512-VNNI: the product of ``int8_native``."""

from __future__ import annotations

import torch

from lowbit.ops.canonical import prepare, restore
from lowbit.ops.cpu.int8_native import ZERO_POINT, can_run, product_operator
from lowbit.ops.int8_static import poisoned_rows, quantize_static
from lowbit.ops.weight_format import Prepared

__all__ = ["can_run", "linear", "prepare", "restore"]


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply a W8A8 linear layer with static activations: ``lowbit.ops.int8_static.linear``."""
    packed, deq_scale = prepared.weight, prepared.scales
    input_scale, input_offset, quant_bias = prepared.static_activations
    rows = x.reshape(-1, x.shape[-1])
    quantized = quantize_static(rows, input_scale, input_offset)
    codes = (quantized.nan_to_num() + ZERO_POINT).to(torch.uint8)
    summand = quant_bias.float() * deq_scale
    scale = deq_scale.unsqueeze(1)
    result: torch.Tensor = product_operator(codes, poisoned_rows(quantized), packed, scale, summand, x.dtype)
    return result.reshape(*x.shape[:-1], packed.shape[0])
