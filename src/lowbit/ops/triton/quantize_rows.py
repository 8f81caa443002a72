"""Symmetric quantization of rows, to int8 or e4m3: one read of a row, or two of a long one."""

# Kernels name compile-time arguments in capitals, and triton.jit is not typed.
# ruff: noqa: N803, N806
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lowbit.ops.triton.launch import on_device_of, row_major, target_of
from lowbit.ops.triton.rounding import (
    E4M3_MAX,
    E4M3_NATIVE,
    E4M3_SOFTWARE,
    INFINITY_BITS,
    INT8,
    INT8_MAX,
    encode,
    magnitude_bits,
    scale_of,
)

# A row up to this long stays in registers between its maximum and its quantization: 8192 values are 32 registers of
# each of 256 threads. Not measured.
LONGEST_BLOCK = 8192


@triton.jit
def quantize_rows_kernel(
    x: tl.tensor,
    quantized: tl.tensor,
    scale: tl.tensor,
    columns: tl.tensor,
    row_stride: tl.tensor,
    ENCODING: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Quantize one row a program.

    x: [rows, columns] floating, rows ``row_stride`` apart; quantized: [rows, columns]; scale: float32 [rows].
    ONE_BLOCK: columns <= BLOCK.
    """
    row = tl.program_id(0).to(tl.int64)
    x += row * row_stride
    quantized += row * columns
    offsets = tl.arange(0, BLOCK)
    LARGEST: tl.constexpr = INT8_MAX if ENCODING == INT8 else E4M3_MAX
    if ONE_BLOCK:
        values = tl.load(x + offsets, mask=offsets < columns, other=0.0).to(tl.float32)
        absmax = tl.max(magnitude_bits(values), axis=0)
        divisor = scale_of(absmax, LARGEST)
        tl.store(quantized + offsets, _quotient(values, divisor, absmax, ENCODING), mask=offsets < columns)
    else:
        running = tl.zeros([BLOCK], tl.int32)
        for start in range(0, columns, BLOCK):
            values = tl.load(x + start + offsets, mask=offsets < columns - start, other=0.0).to(tl.float32)
            running = tl.maximum(running, magnitude_bits(values))
        absmax = tl.max(running, axis=0)
        divisor = scale_of(absmax, LARGEST)
        for start in range(0, columns, BLOCK):
            mask = offsets < columns - start
            values = tl.load(x + start + offsets, mask=mask, other=0.0).to(tl.float32)
            tl.store(quantized + start + offsets, _quotient(values, divisor, absmax, ENCODING), mask=mask)
    tl.store(scale + row, divisor)


@triton.jit
def _quotient(values: tl.tensor, divisor: tl.tensor, absmax: tl.tensor, ENCODING: tl.constexpr) -> tl.tensor:
    """Return ``values / divisor`` encoded; in int8 a row whose maximum is not finite is all zeros."""
    quotient = tl.math.div_rn(values, divisor)
    if ENCODING == INT8:
        quotient = tl.where(absmax < INFINITY_BITS, quotient, 0.0)
    return encode(quotient, ENCODING)


def encoding_of(dtype: torch.dtype, device: torch.device) -> int:
    """Return how kernels on ``device`` write ``dtype`` (int8 or e4m3)."""
    if dtype == torch.int8:
        return int(INT8.value)
    return int((E4M3_NATIVE if target_of(device).has_e4m3 else E4M3_SOFTWARE).value)


def as_written(tensor: torch.Tensor, encoding: int) -> torch.Tensor:
    """Return ``tensor`` as the kernel's pointer is typed: e4m3 as bytes where it is handled in software."""
    return tensor.view(torch.uint8) if encoding == E4M3_SOFTWARE.value else tensor


def block_for(columns: int) -> tuple[int, int]:
    """Return the block that covers ``columns``, or the longest there is, and the warps to work on it."""
    block = min(max(triton.next_power_of_2(columns), 128), LONGEST_BLOCK)
    # 16 to 32 values a thread: 16 bytes of each load, and enough loads in flight. Not measured.
    return block, min(max(block // 512, 1), 8)


def quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row of ``x`` [..., K] floating to ``dtype`` (int8 or e4m3).

    Returns:
        [..., K] in ``dtype`` and float32 scales [..., 1].
    """
    columns = x.shape[-1]
    quantized = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if scale.numel() == 0:
        return quantized, scale
    rows = row_major(x.reshape(-1, columns))
    encoding = encoding_of(dtype, x.device)
    block, num_warps = block_for(columns)
    with on_device_of(x):
        quantize_rows_kernel[(rows.shape[0],)](
            rows,
            as_written(quantized, encoding),
            scale,
            columns,
            rows.stride(0),
            ENCODING=encoding,
            ONE_BLOCK=columns <= block,
            BLOCK=block,
            num_warps=num_warps,
            enable_fp_fusion=False,
        )
    return quantized, scale
