"""FP8 W8A8 (e4m3) in Triton: quantization per token, per group and with a known scale, and scaled matrix products.

The quantized values and scales are the reference's, bit for bit. Products accumulate in float32; in what order, and how
exactly inside a tensor core, is the chip's. Hopper's is reported to keep about 14 bits of a sum, so there sums move to
float32 registers every ``BLOCK_K`` columns.

Where the chip has no e4m3 in the OCP encoding (gfx942 multiplies only FNUZ; XPU) the kernels decode operands to
float16, which is exact, and multiply those: weights still take half the memory, products run at float16's rate.
"""

# Kernels name compile-time arguments in capitals, and triton.jit is not typed.
# ruff: noqa: N803, N806
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from lowbit.errors import UnsupportedError
from lowbit.ops.canonical import prepare, restore
from lowbit.ops.dispatch import Problem
from lowbit.ops.fp8 import E4M3, quantize_activation, scaled_mm_operator
from lowbit.ops.library import register_kernel
from lowbit.ops.triton.launch import device_refusal, expect_shape, on_device_of, row_major, target_of
from lowbit.ops.triton.persistent import can_describe, persistent_mm
from lowbit.ops.triton.quantize_rows import as_written, encoding_of, quantize_rows
from lowbit.ops.triton.rounding import E4M3_MAX, decode_e4m3, encode, magnitude_bits, scale_of
from lowbit.ops.triton.tiles import FP8, FP8_BLOCKS, Tile, choose_tile, pointer_tile, with_depth
from lowbit.ops.triton.tiling import clamped, program_tile, store_tile
from lowbit.ops.weight_format import Prepared

__all__ = ["can_run", "linear", "linears", "prepare", "restore"]

# Columns of a weight block that a step of the kernel can be: powers of two that tensor cores take and shared memory
# holds.
BLOCK_COLUMNS = (32, 64, 128)
# Values a program of the group and tensor quantization handles: 16 for each of 128 threads. Not measured.
VALUES_PER_PROGRAM = 2048


@triton.jit
def quantize_groups_kernel(
    x: tl.tensor,
    quantized: tl.tensor,
    scale: tl.tensor,
    columns: tl.tensor,
    groups: tl.tensor,
    row_stride: tl.tensor,
    GROUP_SIZE: tl.constexpr,
    ENCODING: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Quantize BLOCK_GROUPS groups of one row a program.

    x: [rows, columns] floating, rows ``row_stride`` apart; quantized: [rows, columns]; scale: float32 [rows, groups].
    BLOCK: GROUP_SIZE or the next power of two.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    within = tl.arange(0, BLOCK)
    offsets = group[:, None] * GROUP_SIZE + within[None, :]
    mask = (within[None, :] < GROUP_SIZE) & (offsets < columns)
    values = tl.load(x + row * row_stride + offsets, mask=mask, other=0.0).to(tl.float32)
    divisor = scale_of(tl.max(magnitude_bits(values), axis=1), E4M3_MAX)
    encoded = encode(tl.math.div_rn(values, divisor[:, None]), ENCODING)
    tl.store(quantized + row * columns + offsets, encoded, mask=mask)
    tl.store(scale + row * groups + group, divisor, mask=group < groups)


@triton.jit
def quantize_with_scale_kernel(
    x: tl.tensor,
    quantized: tl.tensor,
    scale: tl.tensor,
    columns: tl.tensor,
    row_stride: tl.tensor,
    ENCODING: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Quantize BLOCK columns of one row a program by the one scale (float32 [])."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < columns
    values = tl.load(x + row * row_stride + offsets, mask=mask, other=0.0).to(tl.float32)
    encoded = encode(tl.math.div_rn(values, tl.load(scale)), ENCODING)
    tl.store(quantized + row * columns + offsets, encoded, mask=mask)


@triton.jit
def operand(pointers: tl.tensor, mask: tl.tensor, MASKED: tl.constexpr, NATIVE: tl.constexpr) -> tl.tensor:
    """Load a tile of e4m3, as float16 unless ``NATIVE``."""
    if NATIVE:
        return tl.load(pointers, mask=mask, other=0.0) if MASKED else tl.load(pointers)
    else:
        return decode_e4m3(tl.load(pointers, mask=mask, other=0) if MASKED else tl.load(pointers))


@triton.jit
def scaled_mm_kernel(
    x: tl.tensor,
    x_scale: tl.tensor,
    weight: tl.tensor,
    weight_scale: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    x_stride: tl.tensor,
    weight_stride: tl.tensor,
    x_scale_row: tl.tensor,
    x_scale_group: tl.tensor,
    weight_scale_row: tl.tensor,
    weight_scale_block: tl.tensor,
    BLOCK_ROWS: tl.constexpr,
    NATIVE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """Compute one [BLOCK_M, BLOCK_N] tile of the scaled product.

    x: e4m3 [m, k]; weight: e4m3 [n, k], as bytes unless NATIVE; bias: [n] or None; out: [m, n]. Rows of x and weight
    are their strides apart, out is contiguous. Scales are float32 with the strides given, 0 for one that does not
    vary. BLOCK_ROWS: 0 for scales that hold for all of k; else the rows of a weight block, whose columns are BLOCK_K.
    EVEN_K: BLOCK_K divides k.
    """
    tile_m, tile_n = program_tile(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP_M)
    first_row = tile_m.to(tl.int64) * BLOCK_M
    first_column = tile_n.to(tl.int64) * BLOCK_N
    rows = clamped(first_row, m, BLOCK_M)
    columns = clamped(first_column, n, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    left = x + first_row * x_stride + rows[:, None] * x_stride + depth[None, :]
    right = weight + first_column * weight_stride + columns[None, :] * weight_stride + depth[:, None]
    row_scale = x_scale + (first_row + rows) * x_scale_row
    # A tile inside one row of weight blocks has one weight scale a step: a scalar.
    ONE_COLUMN_SCALE: tl.constexpr = BLOCK_ROWS > 0 and BLOCK_ROWS % BLOCK_N == 0
    if ONE_COLUMN_SCALE:
        column_scale = weight_scale + first_column // BLOCK_ROWS * weight_scale_row
    elif BLOCK_ROWS > 0:
        column_scale = weight_scale + (first_column + columns) // BLOCK_ROWS * weight_scale_row
    else:
        column_scale = weight_scale + (first_column + columns) * weight_scale_row
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        a = operand(left, depth[None, :] < k - start, not EVEN_K, NATIVE)
        b = operand(right, depth[:, None] < k - start, not EVEN_K, NATIVE)
        if BLOCK_ROWS > 0:
            if ONE_COLUMN_SCALE:
                accumulator += tl.dot(a, b) * (tl.load(row_scale) * tl.load(column_scale))[:, None]
            else:
                accumulator += tl.dot(a, b) * (tl.load(row_scale)[:, None] * tl.load(column_scale)[None, :])
            row_scale += x_scale_group
            column_scale += weight_scale_block
        else:
            accumulator = tl.dot(a, b, accumulator, max_num_imprecise_acc=BLOCK_K)
        left += BLOCK_K
        right += BLOCK_K
    if BLOCK_ROWS == 0:
        # Scales first: a sum times a large scale could overflow where the result does not.
        accumulator *= tl.load(row_scale)[:, None] * tl.load(column_scale)[None, :]
    if bias is not None:
        accumulator += tl.load(bias + first_column + columns).to(tl.float32)[None, :]
    store_tile(out, accumulator, m, n, first_row, first_column, BLOCK_M, BLOCK_N)


def quantize_fp8_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row of ``x``; arguments and results as in ``lowbit.ops.fp8``."""
    return quantize_rows(x, E4M3)


def quantize_fp8_per_group(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row of ``x`` in groups of columns; arguments and results as in ``lowbit.ops.fp8``."""
    columns = x.shape[-1]
    groups = -(-columns // group_size)
    quantized = torch.empty(x.shape, dtype=E4M3, device=x.device)
    scale = torch.empty((*x.shape[:-1], groups), dtype=torch.float32, device=x.device)
    if scale.numel() == 0:
        return quantized, scale
    rows = row_major(x.reshape(-1, columns))
    encoding = encoding_of(E4M3, x.device)
    block = triton.next_power_of_2(group_size)
    block_groups = max(VALUES_PER_PROGRAM // block, 1)
    with on_device_of(x):
        quantize_groups_kernel[(rows.shape[0], -(-groups // block_groups))](
            rows,
            as_written(quantized, encoding),
            scale,
            columns,
            groups,
            rows.stride(0),
            GROUP_SIZE=group_size,
            ENCODING=encoding,
            BLOCK_GROUPS=block_groups,
            BLOCK=block,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return quantized, scale


def quantize_fp8_per_tensor(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Quantize ``x`` with a known scale; arguments and result as in ``lowbit.ops.fp8``."""
    quantized = torch.empty(x.shape, dtype=E4M3, device=x.device)
    if quantized.numel() == 0:
        return quantized
    columns = x.shape[-1] if x.dim() else 1
    rows = row_major(x.reshape(-1, columns))
    encoding = encoding_of(E4M3, x.device)
    with on_device_of(x):
        quantize_with_scale_kernel[(rows.shape[0], -(-columns // VALUES_PER_PROGRAM))](
            rows,
            as_written(quantized, encoding),
            scale,
            columns,
            rows.stride(0),
            ENCODING=encoding,
            BLOCK=VALUES_PER_PROGRAM,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return quantized


def block_refusal(columns: int) -> str | None:
    """Return why weight blocks of that many columns can't be multiplied, or ``None``."""
    if columns in BLOCK_COLUMNS:
        return None
    return f"takes weight blocks of {', '.join(map(str, BLOCK_COLUMNS))} columns, not of {columns}"


def _strides(name: str, scale: torch.Tensor, *shape: int) -> tuple[int, int]:
    """Return the strides of a scale that is one per tensor (0, 0) or has ``shape``."""
    if scale.numel() == 1:
        return 0, 0
    expect_shape(name, scale, *shape)
    return scale.stride(0), scale.stride(1)


def fp8_scaled_mm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    weight_block_size: list[int] | None = None,
) -> torch.Tensor:
    """Multiply two e4m3 matrices and scale the result; arguments and result as in ``lowbit.ops.fp8``."""
    return multiply(x, x_scale, weight, weight_scale, bias, out_dtype, weight_block_size)


def multiply(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    weight_block_size: list[int] | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Compute ``fp8_scaled_mm`` with a tile, by default the table's; with blocks a step is as deep as a block."""
    m, k = x.shape
    n = weight.shape[0]
    block_rows, blocks = 0, 1
    if weight_block_size is not None:
        refusal = block_refusal(weight_block_size[1])
        if refusal is not None:
            raise UnsupportedError(f"fp8_scaled_mm {refusal}")
        block_rows, blocks = weight_block_size[0], -(-k // weight_block_size[1])
    expect_shape("weight", weight, n, k)
    if bias is not None:
        expect_shape("bias", bias, n)
        bias = bias.contiguous()
    out = torch.empty((m, n), dtype=out_dtype, device=x.device)
    if out.numel() == 0:
        return out
    encoding = encoding_of(E4M3, x.device)
    x, weight = as_written(row_major(x), encoding), as_written(row_major(weight), encoding)
    strides = (
        *_strides("x_scale", x_scale, m, blocks),
        *_strides("weight_scale", weight_scale, -(-n // block_rows) if block_rows else n, blocks),
    )
    target = target_of(x.device)
    tile = tile or choose_tile(FP8_BLOCKS if block_rows else FP8, target, m, n)
    if weight_block_size is not None:
        tile = with_depth(tile, weight_block_size[1])
    with on_device_of(x):
        if tile.persistent and can_describe(x) and can_describe(weight):
            persistent_mm(x, x_scale, weight, weight_scale, bias, out, tile, target, strides, block_rows)
        else:
            _launch(x, x_scale, weight, weight_scale, bias, out, pointer_tile(tile), strides, block_rows)
    return out


def _launch(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tile: Tile,
    strides: tuple[int, int, int, int],
    block_rows: int,
) -> None:
    m, n = out.shape
    k = x.shape[1]
    scaled_mm_kernel[(tile.programs(m, n),)](
        x,
        x_scale,
        weight,
        weight_scale,
        bias,
        out,
        m,
        n,
        k,
        x.stride(0),
        weight.stride(0),
        *strides,
        BLOCK_ROWS=block_rows,
        NATIVE=x.dtype == E4M3,
        EVEN_K=k % tile.block_k == 0,
        **tile.constants(),
        **tile.options(),
        enable_fp_fusion=True,
    )


for _key in ("CUDA", "XPU"):
    register_kernel("quantize_fp8_per_token", _key, quantize_fp8_per_token)
    register_kernel("quantize_fp8_per_group", _key, quantize_fp8_per_group)
    register_kernel("quantize_fp8_per_tensor", _key, quantize_fp8_per_tensor)
    register_kernel("fp8_scaled_mm", _key, fp8_scaled_mm)


def can_run(problem: Problem) -> str | None:
    """Return why the kernels here can't run ``problem``, or ``None``."""
    refusal = device_refusal(problem.device, problem.dtype)
    if refusal is not None:
        return refusal
    target = target_of(problem.device)
    if target.backend == "cuda" and not target.has_e4m3:
        return f"no FP8 tensor cores ({target}; they came with SM 8.9)"
    return None if problem.format.block is None else block_refusal(problem.format.block[1])


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply a W8A8 linear layer; arguments and result as in ``lowbit.ops.fp8.linear``.

    The product is an operator; so is the quantization in eager mode. When compiling, the quantization is plain torch,
    which fuses with what precedes it.
    """
    packed, weight_scale, input_scale = prepared.weight, prepared.scales, prepared.input_scale
    weight_block_size = prepared.format.block
    quantized, scale = quantize_activation(x.reshape(-1, x.shape[-1]), input_scale, weight_block_size)
    block = None if weight_block_size is None else list(weight_block_size)
    result: torch.Tensor = scaled_mm_operator(quantized, scale, packed, weight_scale, bias, x.dtype, block)
    return result.reshape(*x.shape[:-1], packed.shape[0])


def linears(x: torch.Tensor, layers: Sequence[Prepared], bias: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """Apply several layers as ``linear`` does, with one input that is quantized once, by rows."""
    quantized, scale = quantize_activation(x.reshape(-1, x.shape[-1]), None, None)
    results = [
        scaled_mm_operator(quantized, scale, layer.weight, layer.scales, b, x.dtype, None)
        for layer, b in zip(layers, bias, strict=True)
    ]
    return [result.reshape(*x.shape[:-1], result.shape[1]) for result in results]
