"""SVDQuant on CPUs: with AMX or AVX512-BF16 the low-rank product is added within the 4-bit one."""

from __future__ import annotations

import torch

from lowbit.ops import nvfp4, svdquant
from lowbit.ops.cpu import native
from lowbit.ops.cpu.weight_only import multiply_fused, takes_bfloat16


def svdquant_weight_only_mm(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    global_scale: torch.Tensor | None,
    unsmoothed: torch.Tensor,
    proj_down: torch.Tensor,
    proj_up: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Multiply as ``lowbit.ops.svdquant.svdquant_weight_only_mm`` does; of few rows the result is rounded once."""
    weight_type = "int4" if global_scale is None else "e2m1"
    if not (0 < x.shape[0] <= native.MOST_ROWS and x.shape[1] and takes_bfloat16(x)):
        return svdquant.svdquant_weight_only_mm(
            x, packed, weight_scale, global_scale, unsmoothed, proj_down, proj_up, bias
        )
    unsmoothed = unsmoothed if unsmoothed.stride(1) == 1 else unsmoothed.contiguous()
    return multiply_fused(
        x,
        packed.contiguous(),
        weight_type,
        weight_scale.contiguous(),
        bias,
        (1, x.shape[1] // weight_scale.shape[1] if global_scale is None else nvfp4.GROUP_SIZE),
        outer_scale=global_scale,
        low_rank=native.LowRank(unsmoothed, proj_down.contiguous(), proj_up.contiguous()),
    )
