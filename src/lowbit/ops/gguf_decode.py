"""Decoders of GGUF's block types in plain torch: the definition of their numbers.

Each takes blocks, uint8 [blocks, bytes of a block], and returns float32 [blocks, elements of a block], computed with
the same operations in the same order as ggml's ``dequantize_row_*``, so the results are equal bit for bit. ``d`` is a
block's float16 scale, ``q`` a code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from lowbit.ops.gguf_decode_small import SMALL_DECODERS

# ggml's kvalues_iq4nl: the 16 values of IQ4_NL and IQ4_XS.
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _float16(blocks: Tensor, first: int) -> Tensor:
    """Return the float16 at byte ``first`` of each block, as float32 [blocks, 1]."""
    return blocks[:, first : first + 2].contiguous().view(torch.float16).float()


@cache
def _shifts(device: torch.device, *values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8, device=device)


def _fields(data: Tensor, bits: int) -> Tensor:
    """Split bytes [..., n] into fields of ``bits`` bits [..., 8 / bits, n], the lowest bits first."""
    shifts = _shifts(data.device, *range(0, 8, bits))
    fields: Tensor = (data.unsqueeze(-2) >> shifts.unsqueeze(-1)) & ((1 << bits) - 1)
    return fields


def _nibbles(data: Tensor) -> Tensor:
    """Return bytes [blocks, n] as codes [blocks, 2 n]: all low nibbles, then all high ones."""
    return _fields(data, 4).flatten(1)


def _bits(data: Tensor) -> Tensor:
    """Return bytes [blocks, 4] as 32 bits [blocks, 32], the lowest of the first byte first."""
    return _fields(data.unsqueeze(-1), 1).flatten(1)


def decode_q8_0(blocks: Tensor) -> Tensor:
    """``q * d``: d, then 32 signed bytes."""
    return blocks[:, 2:].view(torch.int8).float() * _float16(blocks, 0)


def decode_q4_0(blocks: Tensor) -> Tensor:
    """``d * (q - 8)``: d, then 16 bytes whose low nibbles are elements 0 to 15."""
    codes = _nibbles(blocks[:, 2:]).to(torch.int8) - 8
    return _float16(blocks, 0) * codes.float()


def decode_q4_1(blocks: Tensor) -> Tensor:
    """``d * q + m``: d, m, then nibbles as in Q4_0."""
    return _float16(blocks, 0) * _nibbles(blocks[:, 4:]).float() + _float16(blocks, 2)


def decode_q5_0(blocks: Tensor) -> Tensor:
    """``d * (q - 16)``: d, 32 fifth bits, then nibbles as in Q4_0."""
    codes = _nibbles(blocks[:, 6:]) | (_bits(blocks[:, 2:6]) << 4)
    return _float16(blocks, 0) * (codes.to(torch.int8) - 16).float()


def decode_q5_1(blocks: Tensor) -> Tensor:
    """``d * q + m``: d, m, 32 fifth bits, then nibbles as in Q4_0."""
    codes = _nibbles(blocks[:, 8:]) | (_bits(blocks[:, 4:8]) << 4)
    return _float16(blocks, 0) * codes.float() + _float16(blocks, 2)


def decode_q2_k(blocks: Tensor) -> Tensor:
    """``d * s * q - dmin * m`` in 16 groups of 16: 16 bytes of s (low) and m (high), 64 bytes of q, d, dmin."""
    scales = blocks[:, :16]
    scale = _float16(blocks, 80) * (scales & 15).float()
    minimum = _float16(blocks, 82) * (scales >> 4).float()
    codes = _fields(blocks[:, 16:80].unflatten(1, (2, 32)), 2).reshape(-1, 16, 16).float()
    return (scale.unsqueeze(-1) * codes - minimum.unsqueeze(-1)).flatten(1)


def decode_q3_k(blocks: Tensor) -> Tensor:
    """``d * s * q`` in 16 groups of 16: 32 bytes of third bits, 64 of two bits, 12 of six-bit s, d.

    q is the two bits, less 4 where the third bit is not set; s is offset by 32.
    """
    low = _fields(blocks[:, 32:96].unflatten(1, (2, 32)), 2).reshape(-1, 16, 16)
    high = _fields(blocks[:, :32], 1).reshape(-1, 16, 16) ^ 1
    codes = low.to(torch.int8) - (high << 2).to(torch.int8)
    scales = _nibbles(blocks[:, 96:104]) | (_fields(blocks[:, 104:108], 2).flatten(1) << 4)
    scale = _float16(blocks, 108) * (scales.to(torch.int8) - 32).float()
    return (scale.unsqueeze(-1) * codes.float()).flatten(1)


def _scales_and_minimums(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack the twelve bytes of Q4_K and Q5_K to six-bit scales and minimums, each [blocks, 8]."""
    first, second, rest = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat([first & 63, (rest & 15) | ((first >> 2) & 48)], dim=1)
    minimums = torch.cat([second & 63, (rest >> 4) | ((second >> 2) & 48)], dim=1)
    return scales, minimums


def _scaled_with_minimum(blocks: Tensor, codes: Tensor) -> Tensor:
    """Return ``d * s * q - dmin * m`` for codes [blocks, 8, 32] of Q4_K and Q5_K, which begin alike."""
    scales, minimums = _scales_and_minimums(blocks[:, 4:16])
    scale = _float16(blocks, 0) * scales.float()
    minimum = _float16(blocks, 2) * minimums.float()
    return (scale.unsqueeze(-1) * codes.float() - minimum.unsqueeze(-1)).flatten(1)


def decode_q4_k(blocks: Tensor) -> Tensor:
    """``d * s * q - dmin * m`` in 8 groups of 32: d, dmin, 12 bytes of six-bit s and m, 128 bytes of nibbles.

    Of each 32 bytes the low nibbles are one group, the high ones the next.
    """
    return _scaled_with_minimum(blocks, _fields(blocks[:, 16:].unflatten(1, (4, 32)), 4).flatten(1, 2))


def decode_q5_k(blocks: Tensor) -> Tensor:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles: bit i of a byte belongs to group i."""
    low = _fields(blocks[:, 48:].unflatten(1, (4, 32)), 4).flatten(1, 2)
    return _scaled_with_minimum(blocks, low | (_fields(blocks[:, 16:48], 1) << 4))


def decode_q6_k(blocks: Tensor) -> Tensor:
    """``d * s * (q - 32)`` in 16 groups of 16: 128 bytes of nibbles, 64 of two high bits, 16 signed s, d."""
    low = _fields(blocks[:, :128].unflatten(1, (2, 64)), 4).flatten(1)
    high = _fields(blocks[:, 128:192].unflatten(1, (2, 32)), 2).flatten(1)
    codes = (low | (high << 4)).to(torch.int8) - 32
    scale = _float16(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    groups: Tensor = codes.unflatten(1, (16, 16)).float()
    return (scale.unsqueeze(-1) * groups).flatten(1)


def _iq4_values(codes: Tensor) -> Tensor:
    values = torch.tensor(IQ4_VALUES, dtype=torch.float32, device=codes.device)
    return values.index_select(0, codes.flatten().int()).view(codes.shape)


def decode_iq4_nl(blocks: Tensor) -> Tensor:
    """``d * value[q]``: d, then nibbles as in Q4_0 that index ``IQ4_VALUES``."""
    return _float16(blocks, 0) * _iq4_values(_nibbles(blocks[:, 2:]))


def decode_iq4_xs(blocks: Tensor) -> Tensor:
    """``d * s * value[q]`` in 8 groups of 32: d, 2 bytes of high bits of s, 4 of low ones, 128 of nibbles."""
    high = _fields(blocks[:, 2:4].unsqueeze(-1), 2).flatten(1)
    low = _fields(blocks[:, 4:8].unsqueeze(-1), 4).flatten(1)
    scale = _float16(blocks, 0) * ((low | (high << 4)).to(torch.int8) - 32).float()
    codes = _fields(blocks[:, 8:].unflatten(1, (8, 16)), 4).flatten(2)
    return (scale.unsqueeze(-1) * _iq4_values(codes)).flatten(1)


def decode_f32(blocks: Tensor) -> Tensor:
    """Float32 as it is."""
    return blocks.contiguous().view(torch.float32)


def decode_f16(blocks: Tensor) -> Tensor:
    """Float16, widened."""
    return blocks.contiguous().view(torch.float16).float()


def decode_bf16(blocks: Tensor) -> Tensor:
    """Bfloat16, widened."""
    return blocks.contiguous().view(torch.bfloat16).float()


DECODERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "F32": decode_f32,
    "F16": decode_f16,
    "BF16": decode_bf16,
    "Q8_0": decode_q8_0,
    "Q4_0": decode_q4_0,
    "Q4_1": decode_q4_1,
    "Q5_0": decode_q5_0,
    "Q5_1": decode_q5_1,
    "Q2_K": decode_q2_k,
    "Q3_K": decode_q3_k,
    "Q4_K": decode_q4_k,
    "Q5_K": decode_q5_k,
    "Q6_K": decode_q6_k,
    "IQ4_NL": decode_iq4_nl,
    "IQ4_XS": decode_iq4_xs,
    **SMALL_DECODERS,
}
