"""What the products of activations and 8- or 4-bit weights have in common on CPUs.

Up to four rows of 16-bit activations, with AMX up to 21, the native helper multiplies with codes that are integers as
such, at the speed at which memory gives them. Up to ``native.MOST_ROWS`` rows it decodes codes and multiplies in
float32. Rows of bfloat16, any number of them, it multiplies with codes decoded to bfloat16 in the cache, on CPUs with
AVX512-BF16 or AMX. More rows elsewhere, and no helper: blocks of output channels are decoded into the cache
and multiplied by torch in the precision that this CPU is fastest in.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from lowbit.ops.cpu import helper, native
from lowbit.ops.cpu.blocked import Decode, multiply, multiply_float32
from lowbit.ops.cpu.features import fast_matmul_dtype
from lowbit.ops.dispatch import Problem
from lowbit.ops.w4a16 import split_pairs


def can_run(problem: Problem) -> str | None:
    """Return why ``problem`` can't be run, ``None`` when it can."""
    return native.dtype_refusal(problem.dtype)


def has_few_rows(x: torch.Tensor) -> bool:
    """Tell whether ``multiply_fused`` takes x [M, K] in float32."""
    return helper.available() and x.shape[0] <= native.MOST_ROWS and not takes_bfloat16(x)


def takes_bfloat16(x: torch.Tensor) -> bool:
    """Tell whether the native helper takes x [M, K] as it is."""
    return x.dtype == torch.bfloat16 and x.shape[0] > 0 and helper.multiplies_bfloat16()


def is_fused(x: torch.Tensor) -> bool:
    """Tell whether ``multiply_fused`` is there and the best for x [M, K]."""
    return takes_bfloat16(x) or has_few_rows(x)


def multiply_fused(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_type: str,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    block_size: tuple[int, int],
    zero_point: torch.Tensor | None = None,
    outer_scale: torch.Tensor | None = None,
    outer_columns: int = 0,
    low_rank: native.LowRank | None = None,
) -> torch.Tensor:
    """Return ``native.weight_only_product`` [M, N] in the dtype of ``x`` [M, K]; ``low_rank`` only of bfloat16."""
    output = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    bias = None if bias is None else bias.float().contiguous()
    if takes_bfloat16(x):
        values = x if x.stride(1) == 1 else x.contiguous()
    else:
        values = _padded(split_pairs(x) if weight_type == "int4" else x)
    native.weight_only_product(
        values, weight, weight_type, scale, bias, output, block_size, zero_point, outer_scale, outer_columns, low_rank
    )
    return output


def _padded(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` [M, K] in float32, with zeros after its rows up to ``native.ROW_PADDING``."""
    values, columns = x.float(), x.shape[1]
    if columns % native.ROW_PADDING or values.stride() != (columns, 1):
        values = pad(values, (0, -columns % native.ROW_PADDING)).contiguous()[:, :columns]
    return values


@torch.no_grad()
def multiply_decoded(x: torch.Tensor, features: int, decode: Decode, bias: torch.Tensor | None) -> torch.Tensor:
    """Return ``x @ weight.T + bias`` [M, N] in the dtype of ``x`` [M, K], the weight [N, K] from ``decode``.

    Args:
        x: activations.
        features: N.
        decode: writes rows of the weight in the dtype of ``x`` or in float32.
        bias: [N] or ``None``.
    """
    if fast_matmul_dtype(x.dtype) == x.dtype != torch.float32:
        return multiply(x, features, decode, None if bias is None else bias.to(x.dtype))
    output = torch.empty((x.shape[0], features), dtype=x.dtype)
    bias = None if bias is None else bias.float().contiguous()
    multiply_float32(x.float(), features, decode, output, None, None, bias)
    return output
