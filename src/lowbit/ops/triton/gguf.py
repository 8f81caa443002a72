"""GGUF weights in Triton: blocks are decoded in registers and multiplied by the tensor cores in the activations' dtype.

A step of the product takes BLOCK_K elements of a row; the bytes that hold them are found element by element, so that
neighbouring elements read neighbouring bytes. Values are decoded in float32 as the reference does and rounded to the
dtype the product is made in (float32 activations: TF32 is off).

Every row tile of a product decodes the weight anew. From ``FUSED_ROWS`` rows on it is decoded once, to memory, and
multiplied by the vendor's library. Types without a kernel of their own are decoded in plain torch.
"""

# Kernels name compile-time arguments in capitals, and triton.jit is not typed.
# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lowbit.ops import gguf
from lowbit.ops.canonical import prepare, restore
from lowbit.ops.dispatch import Problem
from lowbit.ops.gguf_types import BLOCK_TYPES, block_type
from lowbit.ops.library import register_kernel
from lowbit.ops.triton.launch import (
    Target,
    device_refusal,
    expect_shape,
    on_device_of,
    row_major,
    target_of,
)
from lowbit.ops.triton.tiles import Tile
from lowbit.ops.triton.tiling import clamped, program_tile, store_tile
from lowbit.ops.weight_format import Prepared

__all__ = ["can_run", "linear", "prepare", "restore"]

TYPES = {"Q8_0": 0, "Q4_0": 1, "Q4_K": 2, "Q5_K": 3, "Q6_K": 4}
"""Types with a kernel -> what the kernel calls them."""

Q8_0 = tl.constexpr(TYPES["Q8_0"])
Q4_0 = tl.constexpr(TYPES["Q4_0"])
Q4_K = tl.constexpr(TYPES["Q4_K"])
Q5_K = tl.constexpr(TYPES["Q5_K"])

# By the bytes an SM has to move and decode for a tile; not measured.
FUSED_ROWS = 256
# Few decoded elements a thread, whose addresses and scales take registers too. Chosen by the chips' limits, not
# measured.
TILES: tuple[tuple[int | None, Tile], ...] = (
    (16, Tile(16, 64, 64, num_warps=4, num_stages=3)),
    (64, Tile(64, 64, 32, num_warps=8, num_stages=3)),
    (None, Tile(128, 64, 32, num_warps=8, num_stages=3)),
)
INTERPRETER_TILE = Tile(32, 32, 64, num_warps=1, num_stages=1, group_m=2)
# Rows and elements that a program of the decoder writes.
DECODED_ROWS, DECODED_COLUMNS = 8, 256


@triton.jit
def half_at(address: tl.tensor) -> tl.tensor:
    """Load the float16 at byte addresses (uint8 pointers to even addresses) as float32."""
    bits = tl.load(address).to(tl.uint16) | (tl.load(address + 1).to(tl.uint16) << 8)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def scale_and_minimum(packed: tl.tensor, group: tl.tensor) -> tl.tensor:
    """Return the six-bit scale and minimum (int32) of groups 0 .. 7 from the twelve bytes at ``packed``."""
    within = group % 4
    first = tl.load(packed + within).to(tl.int32)
    second = tl.load(packed + 4 + within).to(tl.int32)
    rest = tl.load(packed + 8 + within).to(tl.int32)
    high = group >= 4
    scale = tl.where(high, (rest & 15) | ((first >> 6) << 4), first & 63)
    minimum = tl.where(high, (rest >> 4) | ((second >> 6) << 4), second & 63)
    return scale, minimum


@triton.jit
def decode(row: tl.tensor, k: tl.tensor, TYPE: tl.constexpr) -> tl.tensor:
    """Return elements ``k`` of the rows at the uint8 pointers ``row``, broadcast against each other, in float32.

    The layouts are those of ``lowbit.ops.gguf_decode``.
    """
    if TYPE == Q8_0:
        block = row + k // 32 * 34
        code = tl.load(block + 2 + k % 32).to(tl.int8, bitcast=True)
        return code.to(tl.float32) * half_at(block)
    elif TYPE == Q4_0:
        block = row + k // 32 * 18
        byte = tl.load(block + 2 + k % 16).to(tl.int32)
        code = (byte >> (k % 32 // 16 * 4)) & 15
        return half_at(block) * (code - 8).to(tl.float32)
    elif TYPE == Q4_K:
        block = row + k // 256 * 144
        group = k % 256 // 32
        scale, minimum = scale_and_minimum(block + 4, group)
        byte = tl.load(block + 16 + group // 2 * 32 + k % 32).to(tl.int32)
        code = (byte >> (group % 2 * 4)) & 15
        return half_at(block) * scale.to(tl.float32) * code.to(tl.float32) - half_at(block + 2) * minimum.to(tl.float32)
    elif TYPE == Q5_K:
        block = row + k // 256 * 176
        group = k % 256 // 32
        scale, minimum = scale_and_minimum(block + 4, group)
        low = (tl.load(block + 48 + group // 2 * 32 + k % 32).to(tl.int32) >> (group % 2 * 4)) & 15
        high = (tl.load(block + 16 + k % 32).to(tl.int32) >> group) & 1
        code = low | (high << 4)
        return half_at(block) * scale.to(tl.float32) * code.to(tl.float32) - half_at(block + 2) * minimum.to(tl.float32)
    else:  # Q6_K
        block = row + k // 256 * 210
        half = k % 256 // 128
        quarter = k % 128 // 32
        low = (tl.load(block + half * 64 + quarter % 2 * 32 + k % 32).to(tl.int32) >> (quarter // 2 * 4)) & 15
        high = (tl.load(block + 128 + half * 32 + k % 32).to(tl.int32) >> (quarter * 2)) & 3
        scale = tl.load(block + 192 + k % 256 // 16).to(tl.int8, bitcast=True).to(tl.float32)
        return half_at(block + 208) * scale * ((low | (high << 4)) - 32).to(tl.float32)


@triton.jit
def dequantize_kernel(
    raw: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    row_bytes: tl.tensor,
    TYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
) -> None:
    """Decode a [BLOCK_ROWS, BLOCK_COLUMNS] tile. raw: uint8 [rows, row_bytes]; out: [rows, columns] floating."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    address = raw + tl.minimum(row, rows - 1)[:, None] * row_bytes
    values = decode(address, tl.minimum(column, columns - 1)[None, :], TYPE)
    tl.store(out + row[:, None] * columns + column[None, :], values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def mm_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    x_stride: tl.tensor,
    row_bytes: tl.tensor,
    TYPE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """Compute one [BLOCK_M, BLOCK_N] tile of ``x @ weight.T + bias``.

    x: [m, k] floating, rows ``x_stride`` apart; weight: uint8 [n, row_bytes]; bias: [n] or None; out: [m, n].
    EVEN_K: BLOCK_K divides k.
    """
    tile_m, tile_n = program_tile(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP_M)
    first_row = tile_m.to(tl.int64) * BLOCK_M
    first_column = tile_n.to(tl.int64) * BLOCK_N
    rows = clamped(first_row, m, BLOCK_M)
    columns = clamped(first_column, n, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    left = x + first_row * x_stride + rows[:, None] * x_stride + depth[None, :]
    right = weight + first_column * row_bytes + columns[None, :] * row_bytes
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        if EVEN_K:
            a = tl.load(left)
            b = decode(right, (start + depth)[:, None], TYPE)
        else:
            a = tl.load(left, mask=depth[None, :] < k - start, other=0.0)
            b = decode(right, tl.minimum(start + depth, k - 1)[:, None], TYPE)
            b = tl.where(depth[:, None] < k - start, b, 0.0)
        accumulator = tl.dot(a, b.to(a.dtype), accumulator, input_precision="ieee")
        left += BLOCK_K
    if bias is not None:
        accumulator += tl.load(bias + first_column + columns).to(tl.float32)[None, :]
    store_tile(out, accumulator, m, n, first_row, first_column, BLOCK_M, BLOCK_N)


def tile_for(target: Target, m: int) -> Tile:
    """Return the tile for a product with ``m`` rows on ``target``."""
    if target.backend == "interpreter":
        return INTERPRETER_TILE
    return next(tile for largest, tile in TILES if largest is None or m <= largest)


def gguf_dequantize(raw: torch.Tensor, weight_type: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Decode rows of blocks; arguments and result as in ``lowbit.ops.gguf``."""
    kind = block_type(weight_type)
    if kind.name not in TYPES or raw.ndim != 2 or raw.dtype != torch.uint8:
        return gguf.gguf_dequantize(raw, weight_type, dtype)
    rows, columns = raw.shape[0], kind.columns(raw.shape[1])
    out = torch.empty((rows, columns), dtype=dtype, device=raw.device)
    if out.numel() == 0:
        return out
    grid = (-(-rows // DECODED_ROWS), -(-columns // DECODED_COLUMNS))
    with on_device_of(raw):
        dequantize_kernel[grid](
            raw.contiguous(),
            out,
            rows,
            columns,
            raw.shape[1],
            TYPE=TYPES[kind.name],
            BLOCK_ROWS=DECODED_ROWS,
            BLOCK_COLUMNS=DECODED_COLUMNS,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out


def gguf_mm(x: torch.Tensor, packed: torch.Tensor, weight_type: str, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply; arguments and result as in ``lowbit.ops.gguf``."""
    kind = block_type(weight_type)
    m, k = x.shape
    n = packed.shape[0]
    if kind.name not in TYPES or m >= FUSED_ROWS:
        weight = gguf_dequantize(packed, weight_type, x.dtype)
        return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    expect_shape("packed", packed, n, kind.row_bytes(k))
    if bias is not None:
        expect_shape("bias", bias, n)
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x, packed = row_major(x), packed.contiguous()
    tile = tile_for(target_of(x.device), m)
    with on_device_of(x):
        mm_kernel[(tile.programs(m, n),)](
            x,
            packed,
            None if bias is None else bias.contiguous(),
            out,
            m,
            n,
            k,
            x.stride(0),
            packed.stride(0),
            TYPE=TYPES[kind.name],
            EVEN_K=k % tile.block_k == 0,
            **tile.constants(),
            **tile.options(),
            enable_fp_fusion=False,
        )
    return out


for _key in ("CUDA", "XPU"):
    register_kernel("gguf_dequantize", _key, gguf_dequantize)
    register_kernel("gguf_mm", _key, gguf_mm)


def can_run(problem: Problem) -> str | None:
    """Return why the kernels here can't run ``problem``, or ``None``."""
    refusal = device_refusal(problem.device, problem.dtype)
    if refusal is not None:
        return refusal
    if problem.format.name and problem.format.name not in TYPES:
        return f"has kernels for {', '.join(TYPES)}, not for {problem.format.name}"
    kind = BLOCK_TYPES[problem.format.name or "Q8_0"]
    if problem.in_features % kind.elements:
        return f"{problem.in_features} input features are not whole blocks of {kind.name}"
    return None


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply a linear layer; arguments and result as in ``lowbit.ops.gguf.linear``."""
    packed, weight_type = prepared.weight, prepared.format.name
    result: torch.Tensor = gguf.mm_operator(x.reshape(-1, x.shape[-1]), packed, weight_type, bias)
    return result.reshape(*x.shape[:-1], packed.shape[0])
