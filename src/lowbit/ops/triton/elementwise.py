"""Norms with rotary embeddings, and gates, in one pass each."""

# Kernels name compile-time arguments in capitals, and triton.jit is not typed.
# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lowbit.ops import elementwise as reference
from lowbit.ops.library import register_kernel
from lowbit.ops.triton.launch import FLOATING_DTYPES, on_device_of

# A row stays in registers; longer ones are the reference's.
LONGEST_ROW = 8192
# Values of a program: 16 of each of 128 threads. Not measured.
PROGRAM_VALUES = 2048


def refusal(dtype: torch.dtype) -> str | None:
    """Return why the kernels here can't compute in ``dtype``, ``None`` when they can."""
    return None if dtype in FLOATING_DTYPES else f"takes float32, bfloat16 or float16, not {dtype}"


@triton.jit
def normalize_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    frequencies: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    heads: tl.tensor,
    period: tl.tensor,
    epsilon: tl.tensor,
    HAS_NORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Compute BLOCK_ROWS rows of ``lowbit.ops.elementwise.normalize``.

    x, out: [rows, width] dense; weight: [width] or None; frequencies: float32 [period, width] or None, cosine and sine
    in turn, of row r that at (r // heads) % period. BLOCK: a power of two, at least width.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    offsets = row[:, None] * width + column[None, :]
    values = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        mean = tl.sum(values * values, axis=1) / width
        values = values * tl.rsqrt(mean + epsilon)[:, None]
    if weight is not None:
        values = values * tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    if frequencies is not None:
        turn = (row // heads) % period
        angles = tl.load(frequencies + turn[:, None] * width + column[None, :], mask=mask, other=0.0)
        cosine, sine = tl.split(tl.reshape(angles, (BLOCK_ROWS, BLOCK // 2, 2)))
        real, imaginary = tl.split(tl.reshape(values, (BLOCK_ROWS, BLOCK // 2, 2)))
        turned = tl.join(real * cosine - imaginary * sine, real * sine + imaginary * cosine)
        values = tl.reshape(turned, (BLOCK_ROWS, BLOCK))
    tl.store(out + offsets, values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gate_kernel(x: tl.tensor, value: tl.tensor, out: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Compute BLOCK values of ``silu(x) * value``; all dense, of ``count`` elements."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    gates = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    result = gates / (1.0 + tl.exp(-gates)) * tl.load(value + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + offsets, result.to(out.dtype.element_ty), mask=mask)


def normalize(
    x: torch.Tensor, epsilon: float | None, weight: torch.Tensor | None, frequencies: torch.Tensor | None
) -> torch.Tensor:
    """Compute ``lowbit.ops.elementwise.normalize``."""
    width = x.shape[-1]
    if refusal(x.dtype) is not None or width > LONGEST_ROW or x.numel() == 0:
        return reference.normalize(x, epsilon, weight, frequencies)
    reference.check_normalized(x, weight, frequencies)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x.numel() // width
    block = triton.next_power_of_2(width)
    block_rows = max(PROGRAM_VALUES // block, 1)
    # Frequencies of one picture are those of every other.
    period = 1 if frequencies is None else frequencies.shape[0] * frequencies.shape[1]
    with on_device_of(x):
        normalize_kernel[(triton.cdiv(rows, block_rows),)](
            x.contiguous(),
            None if weight is None else weight.contiguous(),
            None if frequencies is None else frequencies.contiguous(),
            out,
            rows,
            width,
            1 if frequencies is None else x.shape[2],
            period,
            0.0 if epsilon is None else epsilon,
            HAS_NORM=epsilon is not None,
            BLOCK_ROWS=block_rows,
            BLOCK=block,
            num_warps=8 if block > PROGRAM_VALUES else 4,
            enable_fp_fusion=True,
        )
    return out


def gate(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Compute ``lowbit.ops.elementwise.gate``."""
    if refusal(x.dtype) is not None or x.shape != value.shape or x.dtype != value.dtype or x.numel() == 0:
        return reference.gate(x, value)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with on_device_of(x):
        gate_kernel[(triton.cdiv(x.numel(), PROGRAM_VALUES),)](
            x.contiguous(),
            value.contiguous(),
            out,
            x.numel(),
            BLOCK=PROGRAM_VALUES,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out


for _key in ("CUDA", "XPU"):
    register_kernel("normalize", _key, normalize)
    register_kernel("gate", _key, gate)
