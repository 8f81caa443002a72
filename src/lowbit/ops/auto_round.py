"""AutoRound's layouts of integer weights: codes of 2 to 8 bits in int32 words, in the order of GPTQ or of AWQ.

Codes are a stream of bits over blocks of 32 values: value i occupies the bits from ``i * bits`` on, the lowest bits of
a word first (``auto_round/utils/bit_packing.py``). With N output and K input channels and G groups of inputs:

========  ==========================  ===========================  ==================
packing   ``qweight``                 ``qzeros``                   ``scales``
========  ==========================  ===========================  ==================
gptq      int32 [K * bits / 32, N]    int32 [G, N * bits / 32],    floating [G, N]
                                      zero points less one
native    int32 [K * bits / 32, N]    int32 [G, N * bits / 32]     floating [G, N]
awq       int32 [K, N * bits / 32]    int32 [G, N * bits / 32]     floating [G, N]
========  ==========================  ===========================  ==================

AWQ changes the order within each eight output channels. A code c stands for ``(c - zero point) * scale``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lowbit.errors import UnsupportedError
from lowbit.ops.integer_groups import dequantize_groups

BLOCK = 32
BITS = range(2, 9)
# Where AWQ keeps the output channels of each eight.
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True)
class Packing:
    """How integers lie in words.

    Attributes:
        by_output: words run along output channels, in AWQ's order, not along inputs.
        zero_offset: what is added to a stored zero point.
    """

    by_output: bool
    zero_offset: int


PACKINGS: Mapping[str, Packing] = {
    "gptq": Packing(by_output=False, zero_offset=1),
    "native": Packing(by_output=False, zero_offset=0),
    "awq": Packing(by_output=True, zero_offset=0),
}

_PACKING_OF_PART: Mapping[str, str] = {
    "auto_round": "native",
    "gptqmodel": "native",
    **dict.fromkeys(("auto_gptq", "gptq"), "gptq"),
    **dict.fromkeys(("auto_awq", "awq"), "awq"),
    **dict.fromkeys(("exllamav2", "marlin", "triton", "tritonv2", "torch"), ""),
}


def packing_of(packing_format: str) -> Packing:
    """Return what a ``packing_format`` of AutoRound's names: ``auto_round:auto_gptq``, ``auto_awq``, ``auto_round``...

    Raises:
        UnsupportedError: it names none of them.
    """
    parts = packing_format.lower().replace("-", "_").split(":")
    if set(parts) <= _PACKING_OF_PART.keys():
        # The last part that names an order; what it runs with names none.
        named = [_PACKING_OF_PART[part] for part in parts if _PACKING_OF_PART[part]]
        if named:
            return PACKINGS[named[-1]]
    known = "auto_round:auto_gptq, auto_round:auto_awq, auto_round, auto_gptq, auto_awq, auto_round:gptqmodel"
    raise UnsupportedError(f"auto-round: packing_format {packing_format!r} is not supported", [f"supported: {known}"])


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes uint8 [..., W * 32 / bits] of words int32 [..., W], W a multiple of ``bits``."""
    blocks = words.unflatten(-1, (-1, bits))
    codes = torch.empty((*blocks.shape[:-1], BLOCK), dtype=torch.uint8, device=words.device)
    mask = 2**bits - 1
    for place in range(BLOCK):
        word, offset = divmod(place * bits, 32)
        inside = min(bits, 32 - offset)
        code = (blocks[..., word] >> offset) & (2**inside - 1)
        if inside < bits:
            code = code | ((blocks[..., word + 1] << inside) & mask)
        codes[..., place] = code
    return codes.flatten(-2)


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes [..., 32 * B] (integers below 2**bits) as words int32 [..., bits * B]: undoes ``unpack_words``."""
    blocks = codes.to(torch.int32).unflatten(-1, (-1, BLOCK))
    words = torch.zeros((*blocks.shape[:-1], bits), dtype=torch.int32, device=codes.device)
    for place in range(BLOCK):
        word, offset = divmod(place * bits, 32)
        words[..., word] |= blocks[..., place] << offset
        if offset + bits > 32:
            words[..., word + 1] |= blocks[..., place] >> (32 - offset)
    return words.flatten(-2)


def _from_awq_order(codes: torch.Tensor) -> torch.Tensor:
    ordered: torch.Tensor = codes.unflatten(-1, (-1, 8))[..., AWQ_ORDER]
    return ordered.flatten(-2)


def _to_awq_order(codes: torch.Tensor) -> torch.Tensor:
    inverse = [AWQ_ORDER.index(place) for place in range(8)]
    ordered: torch.Tensor = codes.unflatten(-1, (-1, 8))[..., inverse]
    return ordered.flatten(-2)


def word_shapes(
    out_features: int, in_features: int, groups: int, bits: int, packing: Packing
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of ``qweight`` and ``qzeros``, see the table above."""
    zeros = groups, out_features * bits // BLOCK
    if packing.by_output:
        return (in_features, out_features * bits // BLOCK), zeros
    return (in_features * bits // BLOCK, out_features), zeros


def unpack_weight(qweight: torch.Tensor, bits: int, packing: Packing) -> torch.Tensor:
    """Return the codes uint8 [N, K] of ``qweight``, see the table above."""
    if packing.by_output:
        return _from_awq_order(unpack_words(qweight, bits)).t().contiguous()
    return unpack_words(qweight.t().contiguous(), bits)


def pack_weight(codes: torch.Tensor, bits: int, packing: Packing) -> torch.Tensor:
    """Return codes [N, K] as ``qweight``, see the table above."""
    if packing.by_output:
        return pack_words(_to_awq_order(codes.t()), bits)
    return pack_words(codes, bits).t().contiguous()


def unpack_zero_points(qzeros: torch.Tensor, bits: int, packing: Packing) -> torch.Tensor:
    """Return the zero points int16 [N, G] of ``qzeros``, from 0 to 2**bits."""
    stored = unpack_words(qzeros, bits)
    stored = _from_awq_order(stored) if packing.by_output else stored
    return (stored.to(torch.int16) + packing.zero_offset).t().contiguous()


def pack_zero_points(zero_point: torch.Tensor, bits: int, packing: Packing) -> torch.Tensor:
    """Return zero points [N, G], not below the packing's ``zero_offset``, as ``qzeros``."""
    stored = zero_point.t().to(torch.int32) - packing.zero_offset
    return pack_words(_to_awq_order(stored) if packing.by_output else stored, bits)


def expand_groups(values: torch.Tensor, columns: int, group_size: int, held: int) -> torch.Tensor:
    """Return one value per group of ``group_size`` inputs [N, G] as one per ``held`` inputs [N, columns / held].

    ``held`` divides both; the last group may be short.
    """
    return values.repeat_interleave(group_size // held, dim=1)[:, : columns // held].contiguous()


def auto_round_dequantize(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
    group_size: int,
    packing_format: str = "auto_round:auto_gptq",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return the weight [N, K] that a layer's tensors stand for, computed in float32.

    Args:
        qweight: see the table above.
        qzeros: see the table above.
        scales: [G, N], G = ceil(K / group_size).
        bits: 2 to 8.
        group_size: inputs of a group; -1 for all K.
        packing_format: as ``quantization_config`` spells it.
        dtype: of the result.

    Raises:
        UnsupportedError: an unknown packing.
        ValueError: ``bits`` or shapes that do not fit.
    """
    packing = packing_of(packing_format)
    if bits not in BITS:
        raise ValueError(f"bits must be from {BITS.start} to {BITS.stop - 1}, not {bits}")
    rows = scales.shape[1]
    columns = qweight.shape[0] if packing.by_output else qweight.shape[0] * BLOCK // bits
    size = columns if group_size == -1 else min(group_size, columns)
    groups = -(-columns // max(size, 1))
    needed = (*word_shapes(rows, columns, groups, bits, packing), (groups, rows))
    found = tuple(qweight.shape), tuple(qzeros.shape), tuple(scales.shape)
    if found != needed or rows % BLOCK or columns % BLOCK:
        raise ValueError(f"qweight, qzeros, scales have the shapes {found}; {bits} bits, group_size {size}: {needed}")
    zero_point = unpack_zero_points(qzeros, bits, packing)
    scale, zero = (expand_groups(part, columns, size, 1) for part in (scales.float().t(), zero_point))
    return dequantize_groups(unpack_weight(qweight, bits, packing), scale, zero).to(dtype)
