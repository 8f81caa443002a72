"""Quantizing on CPUs: the native helper when it is there, else the references over rows that fit the cache.

The functions have the names and the results of those in ``lowbit.ops.int8`` and ``lowbit.ops.fp8`` and are the CPU
kernels of the operators of these names. Written as whole-tensor operations the references read and write memory a
dozen times; a few rows at a time they stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lowbit.ops import fp8, int8
from lowbit.ops.cpu import helper, native

ELEMENTS_AT_ONCE = 1 << 17  # of 2**15 ... 2**19 the fastest with 1.25 MiB of second-level cache

Quantizer = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def quantize_int8_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row of ``x`` [..., K] to int8 [..., K] with scales [..., 1]: ``int8.quantize_int8_per_token``."""
    rows = _as_rows(x)
    codes, scale = quantize_blocks(rows, torch.int8, (1, rows.shape[1]), int8.quantize_int8_per_token)
    return codes.view(x.shape), scale.view(*x.shape[:-1], 1)


def quantize_fp8_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row of ``x`` [..., K] to e4m3 [..., K] with scales [..., 1]: ``fp8.quantize_fp8_per_token``."""
    rows = _as_rows(x)
    codes, scale = quantize_blocks(rows, fp8.E4M3, (1, rows.shape[1]), fp8.quantize_fp8_per_token)
    return codes.view(x.shape), scale.view(*x.shape[:-1], 1)


def quantize_fp8_per_group(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize each row of ``x`` [..., K] in groups of columns: ``fp8.quantize_fp8_per_group``."""
    rows = _as_rows(x)
    codes, scale = quantize_blocks(
        rows, fp8.E4M3, (1, group_size), lambda part: fp8.quantize_fp8_per_group(part, group_size)
    )
    return codes.view(x.shape), scale.view(*x.shape[:-1], scale.shape[-1])


def quantize_fp8_per_block(weight: torch.Tensor, block_size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize ``weight`` [N, K] in blocks: ``fp8.quantize_fp8_per_block``."""
    rows, columns = block_size
    return quantize_blocks(
        _as_rows(weight), fp8.E4M3, (rows, columns), lambda part: fp8.quantize_fp8_per_block(part, block_size)
    )


def quantize_uint8_rows(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> None:
    """Quantize rows as ``int8.quantize_int8_per_token`` does, with 128 added.

    Args:
        x: [rows, K] floating.
        codes: written: uint8 [rows, K], dense.
        scale: written: float32 [rows, 1], dense.
    """
    if _takes(x):
        native.quantize(x, codes, scale)
        return
    values = x.float()
    torch.div(values.abs().amax(dim=-1, keepdim=True).clamp_(min=int8.SMALLEST_ABSMAX), int8.INT8_MAX, out=scale)
    quantized = (values / scale).round_().clamp_(-int8.INT8_MAX, int8.INT8_MAX)
    quantized.masked_fill_(~torch.isfinite(scale), 0.0)
    codes.copy_(quantized.add_(128.0))


def quantize_blocks(
    x: torch.Tensor, dtype: torch.dtype, block: tuple[int, int], plain: Quantizer
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix in blocks, natively or with ``plain`` over a few rows at a time.

    Args:
        x: [rows, columns] floating.
        dtype: of the codes, int8 or e4m3.
        block: (rows, columns) of a block.
        plain: the reference.

    Returns:
        Codes [rows, columns] and float32 scales [ceil(rows / block rows), ceil(columns / block columns)].
    """
    rows, columns = x.shape
    if x.numel() == 0:
        return plain(x)
    codes = torch.empty((rows, columns), dtype=dtype)
    scale = torch.empty((-(-rows // block[0]), -(-columns // block[1])), dtype=torch.float32)
    if _takes(x):
        native.quantize(x, codes, scale, *block)
        return codes, scale
    step = max(ELEMENTS_AT_ONCE // (columns * block[0]), 1)
    for first in range(0, scale.shape[0], step):
        part = slice(first * block[0], (first + step) * block[0])
        codes[part], scale[first : first + step] = plain(x[part])
    return codes, scale


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _takes(x: torch.Tensor) -> bool:
    return x.dtype in native.ELEMENT_TYPES and helper.available()
