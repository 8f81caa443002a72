"""Decoders of GGUF's types below four bits and of its FP4 types in plain torch: the definition of their numbers.

Arguments and results are as in ``lowbit.ops.gguf_decode``, bit for bit equal to the ``gguf`` package (0.19.0). That
package has no decoder of Q1_0: here it is ggml's ``dequantize_row_q1_0``. IQ codes index tables of vectors of 4 or 8
elements, which are read from the package at first use.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from lowbit.errors import UnsupportedError

# E2M1's values, doubled: a block's scale is halved instead.
_DOUBLED_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_IQ1_DELTA = 0.125


def _float16(blocks: Tensor, first: int) -> Tensor:
    """Return the float16 at byte ``first`` of each block, as float32 [blocks, 1]."""
    return blocks[:, first : first + 2].contiguous().view(torch.float16).float()


def _words(data: Tensor, size: int) -> Tensor:
    """Return little-endian unsigned integers of ``size`` bytes, as int64 [..., n / size], of bytes [..., n]."""
    parts = data.unflatten(-1, (-1, size)).long()
    words: Tensor = sum((parts[..., i] << (8 * i) for i in range(1, size)), parts[..., 0])
    return words


def _shifted(words: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """Return fields [..., n, shifts] of integers [..., n]."""
    places = torch.tensor(shifts, device=words.device, dtype=words.dtype)
    fields: Tensor = (words.unsqueeze(-1) >> places) & mask
    return fields


def _lookup(values: tuple[int, ...], codes: Tensor) -> Tensor:
    table = torch.tensor(values, dtype=torch.float32, device=codes.device)
    return table[codes.long()]


@cache
def _grid(name: str, device: torch.device) -> Tensor:
    """Return the vectors that the codes of ``name`` index, float32 [codes, 4 or 8].

    Raises:
        UnsupportedError: the ``gguf`` package is not installed.
    """
    try:
        kind = getattr(importlib.import_module("gguf.quants"), name)
    except ImportError as error:
        raise UnsupportedError(f"{name}: its tables are in the gguf package: pip install 'lowbit[gguf]'") from error
    kind.init_grid()
    return torch.tensor(kind.grid, dtype=torch.float32, device=device)[0, 0]


def _vectors(name: str, codes: Tensor) -> Tensor:
    """Return the vectors [..., 4 or 8] of codes."""
    return _grid(name, codes.device)[codes.long()]


def _signs(bits: Tensor) -> Tensor:
    """Return 1 or -1 for the eight bits of bytes [...]: [..., 8], the lowest bit first; a set bit is negative."""
    return 1.0 - 2.0 * _shifted(bits.int(), tuple(range(8)), 1).float()


def _even_signs(codes: Tensor) -> Tensor:
    """Return the signs [..., 8] of codes of seven bits; the eighth makes the number of negative ones even."""
    parity = _shifted(codes, tuple(range(7)), 1).sum(-1) & 1
    return _signs(codes | (parity << 7))


def decode_tq1_0(blocks: Tensor) -> Tensor:
    """``d * (q - 1)``, five ternary q to a byte: 32, then 16 bytes of five, 4 bytes of four, d."""
    parts = []
    for first, count, digits in ((0, 32, 5), (32, 16, 5), (48, 4, 4)):
        powers = 3 ** torch.arange(digits, device=blocks.device)
        parts.append(((blocks[:, None, first : first + count].int() * powers[None, :, None]) & 255).flatten(1))
    digits_of_three = (torch.cat(parts, 1) * 3) >> 8
    return _float16(blocks, 52) * (digits_of_three - 1).float()


def decode_tq2_0(blocks: Tensor) -> Tensor:
    """``d * (q - 1)``: 64 bytes of two-bit q, of each 32 bytes the lowest bits first, d."""
    codes = _shifted(blocks[:, :64].unflatten(1, (2, 32)).int(), (0, 2, 4, 6), 3).transpose(-1, -2)
    return _float16(blocks, 64) * (codes.flatten(1) - 1).float()


def decode_q1_0(blocks: Tensor) -> Tensor:
    """``d`` where a bit is set, else ``-d``: d, then 128 bits, the lowest of a byte first."""
    return _float16(blocks, 0) * -_signs(blocks[:, 2:]).flatten(1)


def decode_mxfp4(blocks: Tensor) -> Tensor:
    """``2**(e - 127) * e2m1[q]``: e, then 16 bytes whose low nibbles are elements 0 to 15; e = 255 is 2**128."""
    exponent = blocks[:, :1].int()
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    codes = torch.cat([blocks[:, 1:] & 15, blocks[:, 1:] >> 4], 1)
    return bits.view(torch.float32) * _lookup(_DOUBLED_E2M1, codes)


def decode_nvfp4(blocks: Tensor) -> Tensor:
    """``s * e2m1[q]`` in 4 groups of 16: 4 e4m3 s whose sign is ignored, then 8 bytes a group, low nibbles first.

    The code 0x7F of s is 0.
    """
    scales = blocks[:, :4].int()
    exponent, mantissa = (scales >> 3) & 15, (scales & 7).float()
    normal = (1.0 + mantissa / 8.0) * torch.exp2(exponent.float() - 7)
    value = torch.where(exponent == 0, mantissa * 2.0**-9, normal) * 0.5
    value = torch.where((scales == 0) | (scales == 0x7F), 0.0, value)
    groups = blocks[:, 4:].unflatten(1, (4, 8))
    codes = torch.cat([groups & 15, groups >> 4], -1)
    return (value.unsqueeze(-1) * _lookup(_DOUBLED_E2M1, codes)).flatten(1)


def decode_iq2_xxs(blocks: Tensor) -> Tensor:
    """``d * (s + 1/2) / 4 * grid[q] * sign`` in 8 groups of 32: d, then 4 bytes of q, 4 sevenths of signs and s."""
    words = blocks[:, 2:].unflatten(1, (8, 8))
    rest = _words(words[..., 4:], 4)[..., 0]
    scale = _float16(blocks, 0) * (0.5 + (rest >> 28).float()) * 0.25
    signs = _even_signs(_shifted(rest, (0, 7, 14, 21), 127))
    return (scale[:, :, None, None] * _vectors("IQ2_XXS", words[..., :4]) * signs).flatten(1)


def _nibble_scales(data: Tensor) -> Tensor:
    """Return bytes [blocks, n] as nibbles [blocks, 2 n] float32, a byte's low one first."""
    return _shifted(data.int(), (0, 4), 15).flatten(1).float()


def decode_iq2_xs(blocks: Tensor) -> Tensor:
    """As IQ2_XXS in 16 groups of 16: d, 32 words of nine bits of q and seven of signs, 8 bytes of s."""
    words = _words(blocks[:, 2:66], 2).unflatten(1, (16, 2))
    scale = _float16(blocks, 0) * (0.5 + _nibble_scales(blocks[:, 66:74])) * 0.25
    return (scale[:, :, None, None] * _vectors("IQ2_XS", words & 511) * _even_signs(words >> 9)).flatten(1)


def decode_iq2_s(blocks: Tensor) -> Tensor:
    """As IQ2_XS with ten bits of q and eight of signs: d, 32 bytes of q, 32 of signs, 8 of high bits, 8 of s."""
    high = _shifted(blocks[:, 66:74].int(), (0, 2, 4, 6), 3).flatten(1)
    codes = (blocks[:, 2:34].int() | (high << 8)).reshape(-1, 16, 2)
    scale = _float16(blocks, 0) * (0.5 + _nibble_scales(blocks[:, 74:82])) * 0.25
    signs = _signs(blocks[:, 34:66]).reshape(-1, 16, 2, 8)
    return (scale[:, :, None, None] * _vectors("IQ2_S", codes) * signs).flatten(1)


def decode_iq3_xxs(blocks: Tensor) -> Tensor:
    """``d * (s + 1/2) / 2 * grid[q] * sign`` in 8 groups of 32: d, 64 bytes of q, 8 words of signs and s."""
    rest = _words(blocks[:, 66:98], 4)
    scale = _float16(blocks, 0) * (0.5 + (rest >> 28).float()) * 0.5
    signs = _even_signs(_shifted(rest, (0, 7, 14, 21), 127))
    vectors = _vectors("IQ3_XXS", blocks[:, 2:66]).reshape(-1, 8, 4, 8)
    return (scale[:, :, None, None] * vectors * signs).flatten(1)


def decode_iq3_s(blocks: Tensor) -> Tensor:
    """``d * (1 + 2 s) * grid[q] * sign`` in 8 groups of 32: d, 64 bytes of q, 8 of ninth bits, 32 of signs, 4 of s."""
    high = _shifted(blocks[:, 66:74].int(), tuple(range(8)), 1).flatten(1)
    codes = blocks[:, 2:66].int() | (high << 8)
    scale = _float16(blocks, 0) * (1 + 2 * _nibble_scales(blocks[:, 106:110]))
    signs = _signs(blocks[:, 74:106]).reshape(-1, 8, 4, 8)
    return (scale[:, :, None, None] * _vectors("IQ3_S", codes).reshape(-1, 8, 4, 8) * signs).flatten(1)


def decode_iq1_s(blocks: Tensor) -> Tensor:
    """``d * (2 s + 1) * (grid[q] +- 1/8)`` in 8 groups of 32: d, 32 bytes of q, 8 words of high bits, s, the sign."""
    words = _words(blocks[:, 34:50], 2)
    scale = _float16(blocks, 0) * (2 * ((words >> 12) & 7) + 1).float()
    delta = torch.where((words & 0x8000) == 0, _IQ1_DELTA, -_IQ1_DELTA)
    high = _shifted(words, (0, 3, 6, 9), 7).flatten(1)
    vectors = _vectors("IQ1_S", blocks[:, 2:34].long() | (high << 8)).reshape(-1, 8, 4, 8)
    return (scale[:, :, None, None] * (vectors + delta[:, :, None, None])).flatten(1)


def decode_iq1_m(blocks: Tensor) -> Tensor:
    """As IQ1_S in 16 groups of 16, each 8 with its own sign: 32 bytes of q, 16 of high bits and signs, 4 words of s.

    The highest four bits of each word make d.
    """
    words = _words(blocks[:, 48:56], 2)
    nibbles = (words >> 12) << torch.tensor([0, 4, 8, 12], device=blocks.device)
    bits = nibbles.sum(1, keepdim=True)
    d = torch.where(bits < 0x8000, bits, bits - 0x10000).to(torch.int16).view(torch.float16).float()
    scale = d * (2 * _shifted(words, (0, 3, 6, 9), 7).flatten(1) + 1).float()
    high = _shifted(blocks[:, 32:48].int(), (0, 4), 15).flatten(1)
    delta = torch.where((high & 8) == 0, _IQ1_DELTA, -_IQ1_DELTA).reshape(-1, 16, 2)
    vectors = _vectors("IQ1_M", blocks[:, :32].int() | ((high & 7) << 8)).reshape(-1, 16, 2, 8)
    return (scale[:, :, None, None] * (vectors + delta.unsqueeze(-1))).flatten(1)


SMALL_DECODERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "TQ1_0": decode_tq1_0,
    "TQ2_0": decode_tq2_0,
    "Q1_0": decode_q1_0,
    "MXFP4": decode_mxfp4,
    "NVFP4": decode_nvfp4,
    "IQ2_XXS": decode_iq2_xxs,
    "IQ2_XS": decode_iq2_xs,
    "IQ2_S": decode_iq2_s,
    "IQ3_XXS": decode_iq3_xxs,
    "IQ3_S": decode_iq3_s,
    "IQ1_S": decode_iq1_s,
    "IQ1_M": decode_iq1_m,
}
