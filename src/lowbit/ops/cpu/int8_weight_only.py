"""Int8 weights with activations left as they are, on CPUs; see ``lowbit.ops.cpu.weight_only`` for how."""

from __future__ import annotations

import torch

from lowbit.ops.cpu import helper, native
from lowbit.ops.cpu.weight_only import is_fused, multiply_decoded, multiply_fused


def int8_weight_only_mm(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Multiply as ``lowbit.ops.int8_weight_only.int8_weight_only_mm`` does, with sums in float32."""
    weight, weight_scale = weight.contiguous(), weight_scale.contiguous()
    if is_fused(x):
        return multiply_fused(x, weight, "int8", weight_scale, bias, (1, weight.shape[1]))

    def decode(first: int, output: torch.Tensor) -> None:
        last = first + output.shape[0]
        if helper.available():
            native.dequantize(weight[first:last], weight_scale[first:last], output)
        else:
            output.copy_(weight[first:last].float().mul_(weight_scale[first:last]))

    return multiply_decoded(x, weight.shape[0], decode, bias)
