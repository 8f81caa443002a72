"""Scaled matrix products on chips with a copy engine for tiles (TMA: SM 9.0).

One program per processor takes tile after tile of the result. Operands come through tensor descriptors: one thread
asks for a whole tile, so that no registers and no instructions go into addresses, and while one tile's results are
scaled and stored the loads of the next are under way. The numbers are those of the kernels in ``int8`` and ``fp8``.
"""

# Kernels name compile-time arguments in capitals, and triton.jit is not typed.
# ruff: noqa: N803, N806
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from lowbit.ops.triton.launch import Target
from lowbit.ops.triton.rounding import decode_e4m3
from lowbit.ops.triton.tiles import Tile
from lowbit.ops.triton.tiling import clamped, program_tile, store_tile


@triton.jit
def step(
    a: tl.tensor,
    b: tl.tensor,
    accumulator: tl.tensor,
    scale: tl.tensor,
    INTEGER: tl.constexpr,
    SCALED: tl.constexpr,
    NATIVE: tl.constexpr,
    LONGEST_SUM: tl.constexpr,
) -> tl.tensor:
    """Return ``accumulator`` plus ``a @ b.T``, times ``scale`` where SCALED; a and b are bytes unless NATIVE."""
    if INTEGER:
        accumulator = tl.dot(a, b.T, accumulator, out_dtype=tl.int32)
    else:
        if not NATIVE:
            a = decode_e4m3(a)
            b = decode_e4m3(b)
        if SCALED:
            accumulator += tl.dot(a, b.T) * scale
        else:
            accumulator = tl.dot(a, b.T, accumulator, max_num_imprecise_acc=LONGEST_SUM)
    return accumulator


@triton.jit
def persistent_mm_kernel(
    x: tl.tensor,
    x_scale: tl.tensor,
    weight: tl.tensor,
    weight_scale: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    x_scale_row: tl.tensor,
    x_scale_group: tl.tensor,
    weight_scale_row: tl.tensor,
    weight_scale_block: tl.tensor,
    BLOCK_ROWS: tl.constexpr,
    INTEGER: tl.constexpr,
    NATIVE: tl.constexpr,
    LONGEST_SUM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """Compute tiles of the scaled product, every ``tl.num_programs(0)``-th.

    x, weight: descriptors of [m, k] and [n, k], zero beyond their ends; bias: [n] or None; out: [m, n], contiguous.
    Scales are float32 with the strides given, 0 for one that does not vary. BLOCK_ROWS: 0 for scales that hold for
    all of k; else the rows of a weight block, whose columns are BLOCK_K. LONGEST_SUM: products added up inside the
    tensor core, ``None`` for all.
    """
    for number in tl.range(
        tl.program_id(0), tl.cdiv(m, BLOCK_M) * tl.cdiv(n, BLOCK_N), tl.num_programs(0), flatten=True
    ):
        tile_m, tile_n = program_tile(number, m, n, BLOCK_M, BLOCK_N, GROUP_M)
        first_row = tile_m.to(tl.int64) * BLOCK_M
        first_column = tile_n.to(tl.int64) * BLOCK_N
        row_scale = x_scale + (first_row + clamped(first_row, m, BLOCK_M)) * x_scale_row
        columns = first_column + clamped(first_column, n, BLOCK_N)
        # A tile inside one row of weight blocks has one weight scale a step: a scalar.
        ONE_COLUMN_SCALE: tl.constexpr = BLOCK_ROWS > 0 and BLOCK_ROWS % BLOCK_N == 0
        if ONE_COLUMN_SCALE:
            column_scale = weight_scale + first_column // BLOCK_ROWS * weight_scale_row
        elif BLOCK_ROWS > 0:
            column_scale = weight_scale + columns // BLOCK_ROWS * weight_scale_row
        else:
            column_scale = weight_scale + columns * weight_scale_row
        accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if INTEGER else tl.float32)
        for block in range(tl.cdiv(k, BLOCK_K)):
            a = x.load([tile_m * BLOCK_M, block * BLOCK_K])
            b = weight.load([tile_n * BLOCK_N, block * BLOCK_K])
            scale = 1.0
            if ONE_COLUMN_SCALE:
                scale = tl.load(row_scale + block * x_scale_group) * tl.load(column_scale + block * weight_scale_block)
                scale = scale[:, None]
            elif BLOCK_ROWS > 0:
                scale = tl.load(row_scale + block * x_scale_group)[:, None]
                scale = scale * tl.load(column_scale + block * weight_scale_block)[None, :]
            accumulator = step(a, b, accumulator, scale, INTEGER, BLOCK_ROWS > 0, NATIVE, LONGEST_SUM)
        if INTEGER:
            # One after the other: the reference's order.
            result = accumulator.to(tl.float32) * tl.load(row_scale)[:, None]
            result *= tl.load(column_scale)[None, :]
        elif BLOCK_ROWS == 0:
            # Scales first: a sum times a large scale could overflow where the result does not.
            result = accumulator * (tl.load(row_scale)[:, None] * tl.load(column_scale)[None, :])
        else:
            result = accumulator
        if bias is not None:
            result += tl.load(bias + columns).to(tl.float32)[None, :]
        store_tile(out, result, m, n, first_row, first_column, BLOCK_M, BLOCK_N)


def can_describe(matrix: torch.Tensor) -> bool:
    """Tell whether a tensor descriptor can describe ``matrix`` [rows, columns] of one-byte elements, unit stride last.

    The hardware wants addresses and row strides in multiples of 16 bytes, and an empty extent has no descriptor.
    """
    return matrix.stride(0) % 16 == 0 and matrix.data_ptr() % 16 == 0 and min(matrix.shape) > 0


def persistent_mm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tile: Tile,
    target: Target,
    strides: tuple[int, int, int, int] = (1, 0, 1, 0),
    block_rows: int = 0,
) -> None:
    """Launch the kernel on checked arguments.

    Args:
        x: [m, k], int8, or e4m3 as the chip takes it (bytes where that is in software).
        x_scale: float32.
        weight: [n, k], as x.
        weight_scale: float32.
        bias: [n], contiguous, or ``None``.
        out: [m, n], contiguous.
        tile: how to cut it up.
        target: the chip.
        strides: of the scales, row and column of each.
        block_rows: rows of a weight block, 0 without blocks.
    """
    m, n = out.shape
    integer = x.dtype == torch.int8
    persistent_mm_kernel[(min(tile.programs(m, n), target.processors),)](
        TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_k]),
        x_scale,
        TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k]),
        weight_scale,
        bias,
        out,
        m,
        n,
        x.shape[1],
        *strides,
        BLOCK_ROWS=block_rows,
        INTEGER=integer,
        NATIVE=x.dtype != torch.uint8,
        LONGEST_SUM=tile.block_k if tile.promoted else None,
        **tile.constants(),
        **tile.options(),
        # int8's epilogue must not be contracted, to give the reference's numbers.
        enable_fp_fusion=not integer,
    )
