"""Int8 W8A8 in Triton: a quantization kernel for activations and a scaled matrix product.

Both give the reference's numbers bit for bit in float32: the product is exact in int32, and the epilogue's
multiplications and addition are done in the reference's order without contraction.
"""

# Kernels name compile-time arguments in capitals, and triton.jit is not typed.
# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from lowbit.errors import UnsupportedError
from lowbit.ops.canonical import prepare, restore
from lowbit.ops.dispatch import Problem
from lowbit.ops.int8 import quantize_activation, scaled_mm_operator
from lowbit.ops.library import register_kernel
from lowbit.ops.triton.launch import device_refusal, expect_shape, on_device_of, row_major, target_of
from lowbit.ops.triton.persistent import can_describe, persistent_mm
from lowbit.ops.triton.quantize_rows import quantize_rows
from lowbit.ops.triton.tiles import INT8, Tile, choose_tile, pointer_tile
from lowbit.ops.triton.tiling import clamped, program_tile, store_tile
from lowbit.ops.weight_format import Prepared

__all__ = ["can_run", "linear", "linears", "prepare", "restore"]

# Beyond this a sum of products of int8 values (-128 included) can leave int32.
LARGEST_K = (2**31 - 1) // (128 * 128)


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
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
) -> None:
    """Compute one [BLOCK_M, BLOCK_N] tile of ``x @ weight.T * x_scale * weight_scale.T + bias``.

    x: int8 [m, k]; weight: int8 [n, k]; x_scale: float32 [m]; weight_scale: float32 [n]; bias: [n] or None;
    out: [m, n]. Rows of x and weight are their strides apart, out is contiguous. EVEN_K: BLOCK_K divides k.
    """
    tile_m, tile_n = program_tile(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP_M)
    first_row = tile_m.to(tl.int64) * BLOCK_M
    first_column = tile_n.to(tl.int64) * BLOCK_N
    rows = clamped(first_row, m, BLOCK_M)
    columns = clamped(first_column, n, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    left = x + first_row * x_stride + rows[:, None] * x_stride + depth[None, :]
    right = weight + first_column * weight_stride + columns[None, :] * weight_stride + depth[:, None]
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(0, k, BLOCK_K):
        if EVEN_K:
            a = tl.load(left)
            b = tl.load(right)
        else:
            a = tl.load(left, mask=depth[None, :] < k - start, other=0)
            b = tl.load(right, mask=depth[:, None] < k - start, other=0)
        accumulator = tl.dot(a, b, accumulator, out_dtype=tl.int32)
        left += BLOCK_K
        right += BLOCK_K
    result = accumulator.to(tl.float32) * tl.load(x_scale + first_row + rows)[:, None]
    result *= tl.load(weight_scale + first_column + columns)[None, :]
    if bias is not None:
        result += tl.load(bias + first_column + columns).to(tl.float32)[None, :]
    store_tile(out, result, m, n, first_row, first_column, BLOCK_M, BLOCK_N)


def quantize_int8_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row of ``x`` symmetrically to int8; arguments and results as in ``lowbit.ops.int8``."""
    return quantize_rows(x, torch.int8)


def int8_scaled_mm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply two int8 matrices and scale the result; arguments and result as in ``lowbit.ops.int8``."""
    return multiply(x, x_scale, weight, weight_scale, bias, out_dtype)


def multiply(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Compute ``int8_scaled_mm`` with a tile, by default the table's."""
    m, k = x.shape
    n = weight.shape[0]
    if k > LARGEST_K:
        raise UnsupportedError(f"int8_scaled_mm: {k} products do not fit an int32 sum; at most {LARGEST_K} do")
    expect_shape("weight", weight, n, k)
    expect_shape("x_scale", x_scale, m, 1)
    expect_shape("weight_scale", weight_scale, n, 1)
    if bias is not None:
        expect_shape("bias", bias, n)
        bias = bias.contiguous()
    out = torch.empty((m, n), dtype=out_dtype, device=x.device)
    if out.numel() == 0:
        return out
    x, weight, x_scale, weight_scale = row_major(x), row_major(weight), x_scale.contiguous(), weight_scale.contiguous()
    target = target_of(x.device)
    tile = tile or choose_tile(INT8, target, m, n)
    with on_device_of(x):
        if tile.persistent and can_describe(x) and can_describe(weight):
            persistent_mm(x, x_scale, weight, weight_scale, bias, out, tile, target)
        else:
            _launch(x, x_scale, weight, weight_scale, bias, out, pointer_tile(tile))
    return out


def _launch(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    tile: Tile,
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
        EVEN_K=k % tile.block_k == 0,
        **tile.constants(),
        **tile.options(),
        enable_fp_fusion=False,
    )


for _key in ("CUDA", "XPU"):
    register_kernel("quantize_int8_per_token", _key, quantize_int8_per_token)
    register_kernel("int8_scaled_mm", _key, int8_scaled_mm)


def can_run(problem: Problem) -> str | None:
    """Return why the kernels here can't run ``problem``, or ``None``."""
    refusal = device_refusal(problem.device, problem.dtype)
    if refusal is not None:
        return refusal
    target = target_of(problem.device)
    if target.backend == "cuda" and int(target.arch) < 80:
        return f"Triton's int8 products need SM 8.0 (this is {target})"
    if problem.in_features > LARGEST_K:
        return f"{problem.in_features} products do not fit an int32 sum; at most {LARGEST_K} do"
    return None


def linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply a W8A8 linear layer; arguments and result as in ``lowbit.ops.int8.linear``.

    The product is an operator; so is the quantization in eager mode. When compiling, the quantization is plain torch,
    which fuses with what precedes it.
    """
    (result,) = linears(x, [prepared], [bias])
    return result


def linears(x: torch.Tensor, layers: Sequence[Prepared], bias: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """Apply several layers as ``linear`` does, with one input that is quantized once."""
    quantized, scale = quantize_activation(x.reshape(-1, x.shape[-1]))
    results = [
        scaled_mm_operator(quantized, scale, layer.weight, layer.scales, b, x.dtype)
        for layer, b in zip(layers, bias, strict=True)
    ]
    return [result.reshape(*x.shape[:-1], result.shape[1]) for result in results]
