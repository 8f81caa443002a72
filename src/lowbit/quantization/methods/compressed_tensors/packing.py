"""Integers of 1 to 8 bits as one stream of bits in int32 words: ``pack_to_int32`` of compressed-tensors 0.20.1.

Code i of a row is in bits i * bits and following, lowest first; 32 codes fill ``bits`` words. A code is the integer
plus ``2 ** (bits - 1)``, so that it is not negative.
"""

from __future__ import annotations

import torch

WORD = 32


def words_of(count: int, bits: int) -> int:
    """Return how many words hold ``count`` codes."""
    return -(-count * bits // WORD)


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return codes uint8 [R, C], 0 to ``2 ** bits - 1``, as int32 [R, ceil(C * bits / 32)]."""
    columns = codes.shape[1]
    padded = torch.nn.functional.pad(codes, (0, -columns % WORD)).long().unflatten(1, (-1, WORD))
    words = torch.zeros(*padded.shape[:2], bits + 1, dtype=torch.int64, device=codes.device)
    for index in range(WORD):
        word, shift = divmod(index * bits, WORD)
        wide = padded[:, :, index] << shift
        words[:, :, word] |= wide & 0xFFFFFFFF
        words[:, :, word + 1] |= wide >> WORD
    packed = words[:, :, :bits].flatten(1)[:, : words_of(columns, bits)]
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32).contiguous()


def unpack_codes(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Return the codes uint8 [R, columns] of ``pack_codes``."""
    words = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).long() & 0xFFFFFFFF
    groups = torch.nn.functional.pad(words.unflatten(1, (-1, bits)), (0, 1))
    codes = torch.empty(*groups.shape[:2], WORD, dtype=torch.uint8, device=packed.device)
    for index in range(WORD):
        word, shift = divmod(index * bits, WORD)
        wide = groups[:, :, word] | (groups[:, :, word + 1] << WORD)
        codes[:, :, index] = ((wide >> shift) & ((1 << bits) - 1)).to(torch.uint8)
    return codes.flatten(1)[:, :columns].contiguous()
