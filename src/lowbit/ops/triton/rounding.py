"""Device functions that scale, round and convert as the references do, bit for bit.

They use integer arithmetic where Triton's own operation differs between chips or in its interpreter: ``tl.max`` of
floats drops NaN, rounding to an integer lives in a library per vendor, float8 needs a chip that has it.
"""

# Kernels name compile-time arguments in capitals, and triton.jit is not typed.
# ruff: noqa: N803
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import struct

import triton
import triton.language as tl

from lowbit.ops.fp8 import E4M3_MAX as _E4M3_MAX
from lowbit.ops.int8 import INT8_MAX as _INT8_MAX
from lowbit.ops.int8 import SMALLEST_ABSMAX

INT8_MAX = tl.constexpr(_INT8_MAX)
E4M3_MAX = tl.constexpr(_E4M3_MAX)
SMALLEST_ABSMAX_BITS = tl.constexpr(struct.unpack("<i", struct.pack("<f", SMALLEST_ABSMAX))[0])
INFINITY_BITS = tl.constexpr(0x7F800000)
# A float32 of magnitude below 2**22 plus 1.5 * 2**23 has no bits left for a fraction: it is rounded half to even.
ROUNDER = tl.constexpr(12582912.0)

# What a kernel writes.
INT8 = tl.constexpr(0)
E4M3_NATIVE = tl.constexpr(1)
E4M3_SOFTWARE = tl.constexpr(2)


@triton.jit
def magnitude_bits(values: tl.tensor) -> tl.tensor:
    """Return the bits of ``abs(values)`` (float32) as int32: ordered as the magnitudes are, NaN above infinity."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(absmax_bits: tl.tensor, LARGEST: tl.constexpr) -> tl.tensor:
    """Return ``max(absmax, 1e-30) / LARGEST`` (float32), NaN for NaN."""
    absmax = tl.maximum(absmax_bits, SMALLEST_ABSMAX_BITS).to(tl.float32, bitcast=True)
    return tl.math.div_rn(absmax, LARGEST)


@triton.jit
def encode_int8(quotient: tl.tensor) -> tl.tensor:
    """Round float32 of magnitude about 127 at most, half to even, to int8 in [-127, 127]; 0 for NaN and infinity."""
    rounded = (quotient + ROUNDER) - ROUNDER
    clamped = tl.minimum(tl.maximum(rounded, -INT8_MAX), INT8_MAX)
    return tl.where(magnitude_bits(quotient) < INFINITY_BITS, clamped, 0.0).to(tl.int8)


@triton.jit
def encode_e4m3(quotient: tl.tensor, NATIVE: tl.constexpr) -> tl.tensor:
    """Convert float32 to e4m3: nearest even, saturating; NaN for NaN and infinity. As bytes unless ``NATIVE``."""
    finite = magnitude_bits(quotient) < INFINITY_BITS
    clamped = tl.minimum(tl.maximum(quotient, -E4M3_MAX), E4M3_MAX)
    if NATIVE:
        return tl.where(finite, clamped, float("nan")).to(tl.float8e4nv)
    else:
        magnitude = magnitude_bits(clamped)
        # From 2**-6 on: round off 20 of the 23 mantissa bits and take the difference of the exponent biases away.
        normal = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1) - ((127 - 7) << 23)) >> 20
        # Below: multiples of 2**-9, which is the last place of 2**14.
        subnormal = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(magnitude < 0x3C800000, subnormal, normal)
        sign = (clamped.to(tl.int32, bitcast=True) >> 24) & 0x80
        return tl.where(finite, code | sign, 0x7F).to(tl.uint8)


@triton.jit
def decode_e4m3(byte: tl.tensor) -> tl.tensor:
    """Convert the bytes of e4m3 values (uint8) to float16, which holds them all exactly."""
    wide = byte.to(tl.int32)
    magnitude = wide & 0x7F
    # The same bits at float16's place mean 2**-8 times the value, subnormal numbers included.
    bits = tl.where(magnitude == 0x7F, 0x7E00, ((wide & 0x80) << 8) | (magnitude << 7))
    return bits.to(tl.uint16).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def encode(quotient: tl.tensor, ENCODING: tl.constexpr) -> tl.tensor:
    """Convert float32 to what ``ENCODING`` names."""
    if ENCODING == INT8:
        return encode_int8(quotient)
    else:
        return encode_e4m3(quotient, ENCODING == E4M3_NATIVE)
