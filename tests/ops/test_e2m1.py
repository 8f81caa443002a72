"""E2M1 against ml_dtypes' conversions and the specification's table."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch

from lowbit.ops import e2m1

# OCP Microscaling Formats specification 1.0, section 5.3.3: sign, two exponent bits with bias 1, one mantissa bit.
TABLE = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def test_every_code_means_what_the_specification_and_ml_dtypes_say() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = e2m1.decode_e2m1(codes)
    assert values.tolist() == TABLE
    assert torch.equal(values.signbit(), torch.tensor(TABLE).signbit())
    theirs = codes.numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(values.numpy(), theirs)


def test_rounds_as_ml_dtypes_and_saturates() -> None:
    finite = torch.tensor(TABLE[:8])
    ties = (finite[1:] + finite[:-1]) / 2
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    near = torch.cat([ties, ties.nextafter(up), ties.nextafter(down), finite, torch.linspace(0, 6, 4001)])
    near = torch.cat([near, torch.tensor([1e-45, 1e-38, 0.2499999])])
    values = torch.cat([near, -near])
    theirs = values.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    np.testing.assert_array_equal(e2m1.encode_e2m1(values).numpy(), theirs)
    beyond = e2m1.encode_e2m1(torch.tensor([6.5, 1e30, torch.inf, -7.0, -torch.inf]))
    assert e2m1.decode_e2m1(beyond).tolist() == [6.0, 6.0, 6.0, -6.0, -6.0]


def test_nan_has_no_code_and_becomes_zero() -> None:
    assert e2m1.encode_e2m1(torch.tensor([torch.nan, -torch.nan])).tolist() == [0, 0]


def test_the_even_column_is_in_the_low_nibble() -> None:
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    packed = e2m1.pack_nibbles(codes)
    assert packed.tolist() == [[0x21, 0x0F]]
    assert torch.equal(e2m1.unpack_nibbles(packed), codes)


def test_packing_is_undone_for_every_byte() -> None:
    packed = torch.arange(256, dtype=torch.uint8).reshape(2, 4, 32)
    assert torch.equal(e2m1.pack_nibbles(e2m1.unpack_nibbles(packed)), packed)
    pairs = e2m1.decode_e2m1_pairs(packed)
    assert torch.equal(pairs.flatten(-2), e2m1.decode_e2m1(e2m1.unpack_nibbles(packed)))
