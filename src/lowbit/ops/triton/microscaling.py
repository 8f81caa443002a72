"""What the MX and NVFP4 kernels share: rounding to e2m1, decoding in registers, and the scaled product.

The product is one kernel. On chips that multiply scaled groups themselves (``tl.dot_scaled`` on SM 10.x and gfx950)
both operands go there as they are. Elsewhere elements times scales are made in registers: an e2m1 or e4m3 number times
a power of two or an e4m3 scale has at most six significant bits, so bfloat16 holds it exactly. Scales above the groups'
(per 512, per row, per matrix) multiply float32 sums.
"""

# Kernels name compile-time arguments in capitals, and triton.jit is not typed.
# ruff: noqa: N803, N806, PLR0912, PLR0915
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from lowbit.ops.e2m1 import E2M1_MAX as _E2M1_MAX
from lowbit.ops.triton.launch import Target, on_device_of, target_of
from lowbit.ops.triton.rounding import INFINITY_BITS, decode_e4m3
from lowbit.ops.triton.tiles import FP8_BLOCKS, Tile, pointer_tile, tiles_for
from lowbit.ops.triton.tiling import clamped, program_tile, store_tile

E2M1_MAX = tl.constexpr(_E2M1_MAX)
E2M1_MAX_BITS = tl.constexpr(0x40C00000)
ONE_BITS = tl.constexpr(0x3F800000)

# What plain numbers are multiplied in. The interpreter has no bfloat16 products: it gets float32.
OPERANDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}

# What an operand is made of.
PLAIN = tl.constexpr(0)  # numbers, without scales
E4M3 = tl.constexpr(1)
E2M1 = tl.constexpr(2)


@triton.jit
def encode_e2m1(values: tl.tensor) -> tl.tensor:
    """Round float32 to e2m1 codes (int32), nearest even, saturating; 0 for NaN."""
    bits = values.to(tl.int32, bitcast=True)
    whole = bits & 0x7FFFFFFF
    magnitude = tl.minimum(whole, E2M1_MAX_BITS)
    normal = (magnitude + 0x1FFFFF + ((magnitude >> 22) & 1) - (126 << 23)) >> 22
    # Below 1: multiples of 0.5, the last place of 2**22.
    subnormal = (magnitude.to(tl.float32, bitcast=True) + 4194304.0).to(tl.int32, bitcast=True) - 0x4A800000
    code = tl.where(magnitude < ONE_BITS, subnormal, normal) | ((bits >> 28) & 8)
    return tl.where(whole > INFINITY_BITS, 0, code)


@triton.jit
def decode_e2m1(code: tl.tensor) -> tl.tensor:
    """Convert e2m1 codes 0 to 15 (int32) to float32."""
    magnitude = code & 7
    bits = tl.where(magnitude < 2, magnitude * 0x3F000000, (magnitude << 22) + (126 << 23))
    return (bits | ((code & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def decode_e8m0(code: tl.tensor) -> tl.tensor:
    """Convert E8M0 codes (uint8) to float32."""
    wide = code.to(tl.int32)
    bits = tl.where(wide == 0, 0x00400000, wide << 23)
    return tl.where(wide == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def scales(pointers: tl.tensor, mask: tl.tensor, SCALE_E4M3: tl.constexpr) -> tl.tensor:
    """Load groups' scales (bytes) as float32."""
    if SCALE_E4M3:
        return decode_e4m3(tl.load(pointers, mask=mask, other=0)).to(tl.float32)
    else:
        return decode_e8m0(tl.load(pointers, mask=mask, other=127))


@triton.jit
def decoded(
    elements: tl.tensor,
    mask: tl.tensor,
    scale: tl.tensor,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Load a tile [ROWS, COLUMNS] of elements (bytes) and return its values times ``scale`` [ROWS, COLUMNS / GROUP]."""
    raw = tl.load(elements, mask=mask, other=0)
    if KIND == E2M1:
        wide = raw.to(tl.int32)
        values = tl.interleave(decode_e2m1(wide & 15), decode_e2m1(wide >> 4))
    else:
        values = decode_e4m3(raw).to(tl.float32)
    spread = tl.broadcast_to(scale[:, :, None], [ROWS, COLUMNS // GROUP, GROUP])
    return values * tl.reshape(spread, [ROWS, COLUMNS])


@triton.jit
def scaled_mm_kernel(
    x: tl.tensor,
    x_scale: tl.tensor,
    x_outer: tl.tensor,
    weight: tl.tensor,
    weight_scale: tl.tensor,
    weight_outer: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    m: tl.tensor,
    n: tl.tensor,
    k: tl.tensor,
    groups: tl.tensor,
    x_stride: tl.tensor,
    weight_stride: tl.tensor,
    x_outer_row: tl.tensor,
    weight_outer_row: tl.tensor,
    X_KIND: tl.constexpr,
    KIND: tl.constexpr,
    SCALE_E4M3: tl.constexpr,
    GROUP: tl.constexpr,
    DUAL: tl.constexpr,
    NATIVE: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """Compute one [BLOCK_M, BLOCK_N] tile of the product of x [m, k] and weight [n, k], both scaled by groups of k.

    Elements and scales are bytes (x is not where X_KIND is PLAIN, and has no scales then). Rows of elements are their
    strides apart, those of scales ``groups``. x_outer, weight_outer: float32 scales above those of the groups, or None:
    with DUAL one per DUAL columns, else one per row; their rows are x_outer_row and weight_outer_row apart.
    """
    tile_m, tile_n = program_tile(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP_M)
    first_row = tile_m.to(tl.int64) * BLOCK_M
    first_column = tile_n.to(tl.int64) * BLOCK_N
    rows = clamped(first_row, m, BLOCK_M)
    columns = clamped(first_column, n, BLOCK_N)
    X_WIDTH: tl.constexpr = BLOCK_K // 2 if X_KIND == E2M1 else BLOCK_K
    WIDTH: tl.constexpr = BLOCK_K // 2 if KIND == E2M1 else BLOCK_K
    x_end = k // 2 if X_KIND == E2M1 else k
    end = k // 2 if KIND == E2M1 else k
    x_depth = tl.arange(0, X_WIDTH)
    depth = tl.arange(0, WIDTH)
    group = tl.arange(0, BLOCK_K // GROUP)
    x_rows = (first_row + rows)[:, None]
    weight_rows = (first_column + columns)[:, None]
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, tl.cdiv(k, BLOCK_K)):
        x_place = step * X_WIDTH + x_depth[None, :]
        place = step * WIDTH + depth[None, :]
        scale_place = step * (BLOCK_K // GROUP) + group[None, :]
        in_groups = scale_place < groups
        left = x + x_rows * x_stride + x_place
        right = weight + weight_rows * weight_stride + place
        right_scale = weight_scale + weight_rows * groups + scale_place
        if NATIVE:
            a = tl.load(left, mask=x_place < x_end, other=0)
            b = tl.load(right, mask=place < end, other=0)
            a_scale = tl.load(x_scale + x_rows * groups + scale_place, mask=in_groups, other=0)
            b_scale = tl.load(right_scale, mask=in_groups, other=0)
            if SCALE_E4M3:
                a_scale = a_scale.to(tl.float8e4nv, bitcast=True)
                b_scale = b_scale.to(tl.float8e4nv, bitcast=True)
            FORMAT: tl.constexpr = "e2m1" if KIND == E2M1 else "e4m3"
            if DUAL > 0:
                product = tl.dot_scaled(a, a_scale, FORMAT, tl.trans(b), b_scale, FORMAT)
            else:
                accumulator = tl.dot_scaled(a, a_scale, FORMAT, tl.trans(b), b_scale, FORMAT, accumulator)
        else:
            b = decoded(right, place < end, scales(right_scale, in_groups, SCALE_E4M3), KIND, GROUP, BLOCK_N, BLOCK_K)
            if X_KIND == PLAIN:
                a = tl.load(left, mask=x_place < x_end, other=0.0)
            else:
                left_scale = scales(x_scale + x_rows * groups + scale_place, in_groups, SCALE_E4M3)
                a = decoded(left, x_place < x_end, left_scale, X_KIND, GROUP, BLOCK_M, BLOCK_K)
            a, b = a.to(OPERAND), b.to(OPERAND)
            if DUAL > 0:
                product = tl.dot(a, tl.trans(b), input_precision="ieee")
            else:
                accumulator = tl.dot(a, tl.trans(b), accumulator, input_precision="ieee")
        if DUAL > 0:
            outer = step * BLOCK_K // DUAL
            product *= tl.load(weight_outer + (first_column + columns) * weight_outer_row + outer)[None, :]
            if x_outer is not None:
                product *= tl.load(x_outer + (first_row + rows) * x_outer_row + outer)[:, None]
            accumulator += product
    if DUAL == 0:
        if x_outer is not None:
            accumulator *= tl.load(x_outer + (first_row + rows) * x_outer_row)[:, None]
        if weight_outer is not None:
            accumulator *= tl.load(weight_outer + (first_column + columns) * weight_outer_row)[None, :]
    if bias is not None:
        accumulator += tl.load(bias + first_column + columns).to(tl.float32)[None, :]
    store_tile(out, accumulator, m, n, first_row, first_column, BLOCK_M, BLOCK_N)


def tile_for(target: Target, m: int, constants: Mapping[str, Any]) -> Tile:
    """Return the tile for a product with ``m`` rows on ``target``; its depth is a multiple of every group's size.

    With dual scales each step's product is held beside the sum, and decoding takes registers for either operand: those
    tiles are smaller, or have more warps, so that nothing spills.
    """
    tiles = tiles_for(FP8_BLOCKS, target)
    tile = pointer_tile(next((tile for tile in reversed(tiles) if m <= tile.block_m), tiles[0]))
    is_plain = constants["X_KIND"] == PLAIN.value
    is_decoded = not (is_plain or multiplies_scaled(target, constants["SCALE_E4M3"]))
    if is_decoded and tile.block_m > 64:
        tile = replace(tile, block_m=64, num_warps=8 if target.has_wide_tiles else 4)
    if constants["DUAL"] > 0 or is_decoded:
        tile = replace(tile, block_n=min(tile.block_n, 64))
    return replace(tile, num_warps=8) if is_plain and target.backend == "cuda" and tile.block_m >= 64 else tile


def multiplies_scaled(target: Target, scale_e4m3: bool) -> bool:
    """Tell whether the chip multiplies groups with E8M0 scales, or e4m3 ones, itself."""
    return target.has_scaled_dot and (target.backend == "cuda" or not scale_e4m3)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` as the kernel reads elements and scales."""
    return tensor if tensor.dtype == torch.uint8 else tensor.view(torch.uint8)


def multiply(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    x_outer: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_outer: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    constants: Mapping[str, Any],
) -> torch.Tensor:
    """Launch the product.

    Args:
        x: elements [M, ...], or numbers [M, K] with ``X_KIND`` PLAIN.
        x_scale: of its groups, ``None`` with numbers.
        x_outer: float32 [M or 1, 1 or groups of DUAL], or ``None``.
        weight: elements [N, ...].
        weight_scale: of its groups [N, groups].
        weight_outer: float32 [N or 1, 1 or groups of DUAL], or ``None``.
        bias: [N] or ``None``.
        out_dtype: of the result.
        constants: the kernel's, but for the tile's and NATIVE.

    Returns:
        [M, N] in ``out_dtype``.
    """
    m, n, groups = x.shape[0], weight.shape[0], weight_scale.shape[1]
    k = weight.shape[1] * (2 if constants["KIND"] == E2M1.value else 1)
    out = torch.empty((m, n), dtype=out_dtype, device=x.device)
    if out.numel() == 0:
        return out
    target = target_of(x.device)
    is_plain = constants["X_KIND"] == PLAIN.value
    tile = tile_for(target, m, constants)
    with on_device_of(x):
        scaled_mm_kernel[(tile.programs(m, n),)](
            x if is_plain else as_bytes(x),
            None if x_scale is None else as_bytes(x_scale),
            x_outer,
            as_bytes(weight),
            as_bytes(weight_scale),
            weight_outer,
            None if bias is None else bias.contiguous(),
            out,
            m,
            n,
            k,
            groups,
            x.stride(0),
            weight.stride(0),
            _row_stride(x_outer),
            _row_stride(weight_outer),
            NATIVE=not is_plain and multiplies_scaled(target, constants["SCALE_E4M3"]),
            OPERAND=tl.float32 if target.backend == "interpreter" else OPERANDS[x.dtype] if is_plain else tl.bfloat16,
            **constants,
            **tile.constants(),
            **tile.options(),
            enable_fp_fusion=True,
        )
    return out


def _row_stride(outer: torch.Tensor | None) -> int:
    return 0 if outer is None or outer.shape[0] == 1 else outer.stride(0)
