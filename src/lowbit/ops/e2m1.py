"""E2M1, the four-bit float of MXFP4 and NVFP4 (OCP Microscaling Formats specification 1.0, section 5.3.3).

A code is a sign (bit 3) and one of 0, 0.5, 1, 1.5, 2, 3, 4, 6; there is no infinity and no NaN. Two codes make a byte,
the even column in the low nibble.
"""

from __future__ import annotations

import torch

E2M1_MAX = 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_CODES = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)])
_ONE_BITS = 0x3F800000
# A magnitude below 1 plus 2**22 is rounded, half to even, to a multiple of 0.5, the last place there.
_HALVES = 4194304.0
_HALVES_BITS = 0x4A800000


def encode_e2m1(values: torch.Tensor) -> torch.Tensor:
    """Round float32 of any shape to e2m1, nearest, ties to even; saturating.

    Returns:
        Codes 0 to 15 in uint8; those of NaN are 0.
    """
    bits = torch.nan_to_num(values, nan=0.0).clamp(-E2M1_MAX, E2M1_MAX).view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    # From 1 on: round off 22 of the 23 mantissa bits and take the difference of the exponent biases away.
    normal = (magnitude + 0x1FFFFF + ((magnitude >> 22) & 1) - (126 << 23)) >> 22
    subnormal = (magnitude.view(torch.float32) + _HALVES).view(torch.int32) - _HALVES_BITS
    code = torch.where(magnitude < _ONE_BITS, subnormal, normal)
    return (code | ((bits >> 28) & 8)).to(torch.uint8)


def decode_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """Return the float32 values of e2m1 codes (uint8, of which the low four bits count; any shape)."""
    return _CODES.to(codes.device)[(codes & 15).long()]


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Return codes 0 to 15, uint8 [..., K] with K even, two to a byte: uint8 [..., K / 2]."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Return the codes, uint8 [..., K], of bytes uint8 [..., K / 2]; the inverse of ``pack_nibbles``."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def decode_e2m1_pairs(packed: torch.Tensor) -> torch.Tensor:
    """Return the float32 values [..., 2] of bytes (uint8 [...]): of the low nibble, then of the high one."""
    return torch.nn.functional.embedding(packed.int(), _pair_values(packed.device))


def _pair_values(device: torch.device) -> torch.Tensor:
    byte = torch.arange(256, device=device)
    return _CODES.to(device)[torch.stack((byte & 15, byte >> 4), dim=-1)]
