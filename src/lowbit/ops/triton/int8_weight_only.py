"""Int8 or e4m3 weights with activations left as they are, in Triton: for products that read weights and little else."""

# Kernels name compile-time arguments in capitals, and triton.jit is not typed.
# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lowbit.ops.canonical import prepare, restore
from lowbit.ops.int8_weight_only import linear
from lowbit.ops.library import register_kernel
from lowbit.ops.triton.launch import can_run, expect_shape, on_device_of, row_major
from lowbit.ops.triton.rounding import decode_e4m3
from lowbit.ops.triton.tiling import clamped, store_tile

__all__ = ["can_run", "linear", "prepare", "restore"]

# Beyond this many rows a weight is better decoded once and multiplied by torch. Not measured.
MOST_ROWS = 64
BLOCK_M, BLOCK_N, BLOCK_K = 16, 64, 128


@triton.jit
def weight_only_mm_kernel(
    x: tl.tensor,
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
) -> None:
    """Compute one [BLOCK_M, BLOCK_N] tile of ``x @ weight.T * weight_scale + bias``.

    x: [m, k] floating; weight: int8, or the bytes (uint8) of e4m3, [n, k]; weight_scale: float32 [n]; bias: [n] or
    None; out: [m, n], contiguous. Rows of x and weight are their strides apart. EVEN_K: BLOCK_K divides k.
    """
    first_row = tl.program_id(1).to(tl.int64) * BLOCK_M
    first_column = tl.program_id(0).to(tl.int64) * BLOCK_N
    rows = clamped(first_row, m, BLOCK_M)
    columns = clamped(first_column, n, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    left = x + first_row * x_stride + rows[:, None] * x_stride + depth[None, :]
    right = weight + first_column * weight_stride + columns[None, :] * weight_stride + depth[:, None]
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, k, BLOCK_K):
        if EVEN_K:
            a = tl.load(left)
            b = tl.load(right)
        else:
            a = tl.load(left, mask=depth[None, :] < k - start, other=0.0)
            b = tl.load(right, mask=depth[:, None] < k - start, other=0)
        if weight.dtype.element_ty == tl.uint8:
            b = decode_e4m3(b)
        # Every int8 and every e4m3 value is exact in each dtype of activations.
        accumulator = tl.dot(a, b.to(a.dtype), accumulator, input_precision="ieee")
        left += BLOCK_K
        right += BLOCK_K
    result = accumulator * tl.load(weight_scale + first_column + columns)[None, :]
    if bias is not None:
        result += tl.load(bias + first_column + columns).to(tl.float32)[None, :]
    store_tile(out, result, m, n, first_row, first_column, BLOCK_M, BLOCK_N)


def weight_only_mm(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Multiply x [M, K] floating by weight [N, K] (int8, or e4m3 as bytes) with scales [N, 1]; [M, N] as ``x``."""
    m, k = x.shape
    n = weight.shape[0]
    expect_shape("weight", weight, n, k)
    expect_shape("weight_scale", weight_scale, n, 1)
    if bias is not None:
        expect_shape("bias", bias, n)
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x, weight = row_major(x), row_major(weight)
    with on_device_of(x):
        weight_only_mm_kernel[(-(-n // BLOCK_N), -(-m // BLOCK_M))](
            x,
            weight,
            weight_scale.contiguous(),
            None if bias is None else bias.contiguous(),
            out,
            m,
            n,
            k,
            x.stride(0),
            weight.stride(0),
            EVEN_K=k % BLOCK_K == 0,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            num_warps=4,
            num_stages=4,
            enable_fp_fusion=True,
        )
    return out


def int8_weight_only_mm(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Multiply floating activations by int8 weights; arguments and result as in ``lowbit.ops.int8_weight_only``."""
    if x.shape[0] > MOST_ROWS:
        decoded = (weight.float() * weight_scale).to(x.dtype)
        return torch.nn.functional.linear(x, decoded, None if bias is None else bias.to(x.dtype))
    return weight_only_mm(x, weight, weight_scale, bias)


for _key in ("CUDA", "XPU"):
    register_kernel("int8_weight_only_mm", _key, int8_weight_only_mm)
