"""Int8 weights with activations left as they are, on CPUs.

Few rows of bfloat16 go to torch's own kernel, which converts weights in registers. Its scales are bfloat16: it gets
ones, and the float32 scales are applied to its result, which so is rounded to bfloat16 once more than the reference's.
More rows, and other dtypes (unscaled sums can leave float16), take the weight a block of output channels at a time.
"""

from __future__ import annotations

import torch

from lowbit.ops.cpu.blocked import multiply, multiply_float32
from lowbit.ops.cpu.features import fast_matmul_dtype

# Up to here torch's kernel was faster than bfloat16's own product (K 3072, N 18432, Ice Lake, 2 cores: 5.0 ms against
# 9.5 with 1 row, 91 against 172 with 32).
MOST_ROWS = 32
# Shapes that torch's kernel takes: it reads whole vectors and does not check.
MULTIPLE = 64


@torch.no_grad()
def int8_weight_only_mm(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Multiply floating activations by int8 weights; arguments and result as in ``lowbit.ops.int8_weight_only``."""
    aligned = weight.shape[0] % MULTIPLE == 0 and weight.shape[1] % MULTIPLE == 0
    if x.dtype == torch.bfloat16 and 0 < x.shape[0] <= MOST_ROWS and aligned:
        ones = torch.ones(weight.shape[0], dtype=x.dtype)
        result = torch._weight_int8pack_mm(x.contiguous(), weight.contiguous(), ones).float() * weight_scale.t()
        return (result if bias is None else result + bias.float()).to(x.dtype)

    def decode(first: int, output: torch.Tensor) -> None:
        last = first + output.shape[0]
        output.copy_(weight[first:last].float().mul_(weight_scale[first:last]))

    features = weight.shape[0]
    if fast_matmul_dtype(x.dtype) == x.dtype != torch.float32:
        return multiply(x, features, decode, None if bias is None else bias.to(x.dtype))
    output = torch.empty((x.shape[0], features), dtype=x.dtype)
    multiply_float32(x.float(), features, decode, output, None, None, None if bias is None else bias.float())
    return output
