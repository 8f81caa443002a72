"""Device functions that place a program's tile in a matrix product's result."""

# Kernels name compile-time arguments in capitals, and triton.jit is not typed.
# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def program_tile(
    program: tl.tensor, m: tl.tensor, n: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr
) -> tl.tensor:
    """Return the row tile and the column tile that are number ``program`` of an [m, n] result.

    Programs that run together walk down ``GROUP_M`` row tiles before they take the next column tile, so that both
    operands' tiles are found in the L2 cache.
    """
    group_size = GROUP_M * tl.cdiv(n, BLOCK_N)
    first = program // group_size * GROUP_M
    height = tl.minimum(tl.cdiv(m, BLOCK_M) - first, GROUP_M)
    within = program % group_size
    return first + within % height, within // height


@triton.jit
def clamped(first: tl.tensor, end: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Return offsets 0 .. BLOCK-1 (int32) from ``first`` that stop at the last one before ``end``.

    What lies beyond the edge repeats the last row or column: loads need no mask, and its results are not stored.
    """
    return tl.minimum(tl.arange(0, BLOCK), (end - first - 1).to(tl.int32))


@triton.jit
def store_tile(
    out: tl.tensor,
    result: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    first_row: tl.tensor,
    first_column: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Store ``result`` [BLOCK_M, BLOCK_N] from (first_row, first_column), int64, on in ``out`` [m, n], contiguous."""
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    inside = (rows[:, None] < m - first_row) & (columns[None, :] < n - first_column)
    origin = out + first_row * n + first_column
    tl.store(origin + rows[:, None] * n + columns[None, :], result.to(out.dtype.element_ty), mask=inside)
