"""The 4-bit reference: its layout, its rounding, its numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowbit.ops import int8, int8_weight_only, w4a16
from tests.support import calls


def test_bytes_are_those_of_little_endian_words_of_eight_codes() -> None:
    codes = torch.randint(0, 16, (3, 64), dtype=torch.uint8)
    words = np.zeros((3, 8), dtype="<u4")
    for i in range(64):
        words[:, i // 8] |= codes[:, i].numpy().astype("<u4") << (4 * (i % 8))
    packed = w4a16.pack_int4(codes)
    assert packed.numpy().tobytes() == words.tobytes()
    assert torch.equal(w4a16.unpack_int4(packed), codes)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_every_value_is_near_what_its_code_stands_for(
    group_size: int, symmetric: bool, scale_dtype: torch.dtype
) -> None:
    weight = torch.randn(5, 256) + 0.3
    weight[0] = 0
    weight[1, 7] = 50.0
    weight[2] = weight[2].abs()
    packed, scale, zero = w4a16.quantize_int4_per_group(weight, group_size, symmetric, scale_dtype)
    assert packed.shape == (5, 128)
    assert (scale.shape, scale.dtype) == ((5, 256 // group_size), scale_dtype)
    assert (zero is None) == symmetric
    decoded = w4a16.dequantize_int4(packed, scale, zero)
    step = scale.double().repeat_interleave(group_size, dim=1)
    # Half a step of rounding; the largest value of a symmetric group is 7.5 steps and gets 7; zero points round, and so
    # do bfloat16 scales: half a step more each.
    allowed = 0.5 + (0 if symmetric else 0.5) + (0 if scale_dtype == torch.float32 else 15 * 2**-9)
    assert ((decoded.double() - weight.double()).abs() <= allowed * step * (1 + 1e-5)).all()
    assert not decoded[0].any()


def test_the_product_is_that_of_the_decoded_weight() -> None:
    codes = torch.randint(0, 16, (6, 64), dtype=torch.uint8)
    scale, zero = torch.rand(6, 2), torch.randint(0, 16, (6, 2), dtype=torch.uint8)
    expected = torch.empty(6, 64, dtype=torch.float64)
    for row in range(6):
        for i in range(64):
            expected[row, i] = (int(codes[row, i]) - int(zero[row, i // 32])) * float(scale[row, i // 32])
    x, bias = torch.randn(2, 3, 64), torch.randn(6)
    result = calls.linear(w4a16, x, w4a16.pack_int4(codes), scale, bias, zero)
    torch.testing.assert_close(result.double(), x.double() @ expected.t() + bias.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group_size", [0, 16, 48, 128])
def test_group_sizes_that_do_not_fit(group_size: int) -> None:
    with pytest.raises(ValueError, match=f"group_size {group_size} .* divides the 96 input features"):
        w4a16.quantize_int4_per_group(torch.randn(4, 96), group_size)


def test_int8_reference() -> None:
    codes, scale = int8.quantize_int8_per_token(torch.randn(6, 40))
    x, bias = torch.randn(2, 3, 40), torch.randn(6)
    expected = x.double() @ (codes.double() * scale.double()).t() + bias.double()
    result = calls.linear(int8_weight_only, x, codes, scale, bias)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
