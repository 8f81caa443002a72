"""Weights of 4 and 8 bits in groups, with activations left as they are, in Triton: decoded in registers.

Values are decoded in float32 as the references do and rounded to the dtype of the activations, in which the tensor
cores multiply. Every row tile decodes the weight anew: from ``FUSED_ROWS`` rows on it is decoded once, to memory.
"""

# Kernels name compile-time arguments in capitals, and triton.jit is not typed.
# ruff: noqa: N803, SIM108
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lowbit.ops.triton.gguf import FUSED_ROWS, tile_for
from lowbit.ops.triton.launch import expect_shape, on_device_of, row_major, target_of
from lowbit.ops.triton.tiles import with_depth
from lowbit.ops.triton.tiling import clamped, program_tile, store_tile

__all__ = ["FUSED_ROWS", "multiply"]

# Groups of 4-bit codes are multiples of it: a step has one scale for each output channel.
BLOCK_K = 32


@triton.jit
def mm_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    weight_scale: tl.tensor,
    zero_point: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    groups: tl.tensor,
    group_size: tl.tensor,
    x_stride: tl.tensor,
    weight_stride: tl.tensor,
    MIDDLE: tl.constexpr,
    IS_PACKED: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """Compute one [BLOCK_M, BLOCK_N] tile of ``x @ ((weight - zero_point) * weight_scale).T + bias``.

    x: [m, k] floating; weight: int8 [n, k], or with IS_PACKED uint8 [n, k / 2], the even column in the low half;
    weight_scale, zero_point: [n, groups], of ``group_size`` columns each; zero_point None: MIDDLE; bias: [n] or None;
    out: [m, n]. Rows of x and weight are their strides apart. EVEN_K: BLOCK_K divides k; ONE_GROUP: and group_size.
    """
    tile_m, tile_n = program_tile(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP_M)
    first_row = tile_m.to(tl.int64) * BLOCK_M
    first_column = tile_n.to(tl.int64) * BLOCK_N
    rows = clamped(first_row, m, BLOCK_M)
    columns = clamped(first_column, n, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    left = x + first_row * x_stride + rows[:, None] * x_stride + depth[None, :]
    right = weight + first_column * weight_stride + columns[None, :] * weight_stride
    channel_groups = first_column * groups + columns[None, :] * groups
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        if EVEN_K:
            a = tl.load(left)
        else:
            a = tl.load(left, mask=depth[None, :] < k - start, other=0.0)
        place = tl.minimum(start + depth, k - 1)[:, None]
        if IS_PACKED:
            code = (tl.load(right + place // 2).to(tl.int32) >> (place % 2 * 4)) & 15
        else:
            code = tl.load(right + place).to(tl.int32)
        if ONE_GROUP:
            group = channel_groups + start // group_size
        else:
            group = channel_groups + place // group_size
        if zero_point is None:
            difference = (code - MIDDLE).to(tl.float32)
        else:
            difference = code.to(tl.float32) - tl.load(zero_point + group).to(tl.float32)
        # Beyond k the activations are zero, and the repeated last column is finite.
        b = difference * tl.load(weight_scale + group).to(tl.float32)
        accumulator = tl.dot(a, b.to(a.dtype), accumulator, input_precision="ieee")
        left += BLOCK_K
    if bias is not None:
        accumulator += tl.load(bias + first_column + columns).to(tl.float32)[None, :]
    store_tile(out, accumulator, m, n, first_row, first_column, BLOCK_M, BLOCK_N)


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    middle: int,
) -> torch.Tensor:
    """Launch the product.

    Args:
        x: [M, K] floating.
        weight: int8 [N, K], or uint8 [N, K / 2] in the layout of ``lowbit.ops.w4a16``.
        weight_scale: float32 or bfloat16 [N, groups].
        bias: [N] or ``None``.
        zero_point: [N, groups], or ``None`` for ``middle`` everywhere.
        middle: see ``zero_point``.

    Returns:
        [M, N] in ``x.dtype``.

    Raises:
        ValueError: shapes that do not fit.
    """
    (m, k), n, groups = x.shape, weight.shape[0], weight_scale.shape[1]
    is_packed = weight.dtype == torch.uint8
    expect_shape("weight", weight, n, k // 2 if is_packed else k)
    expect_shape("weight_scale", weight_scale, n, groups)
    for name, tensor, shape in (("zero_point", zero_point, (n, groups)), ("bias", bias, (n,))):
        if tensor is not None:
            expect_shape(name, tensor, *shape)
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x, weight = row_major(x), row_major(weight)
    target = target_of(x.device)
    tile = tile_for(target, m)
    if target.backend != "interpreter":
        tile = with_depth(tile, BLOCK_K)
    group_size = k // groups
    with on_device_of(x):
        mm_kernel[(tile.programs(m, n),)](
            x,
            weight,
            weight_scale.contiguous(),
            None if zero_point is None else zero_point.contiguous(),
            None if bias is None else bias.contiguous(),
            out,
            m,
            n,
            k,
            groups,
            group_size,
            x.stride(0),
            weight.stride(0),
            MIDDLE=middle,
            IS_PACKED=is_packed,
            ONE_GROUP=group_size % tile.block_k == 0,
            EVEN_K=k % tile.block_k == 0,
            **tile.constants(),
            **tile.options(),
            enable_fp_fusion=False,
        )
    return out
