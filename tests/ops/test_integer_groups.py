"""Weights of 4 and 8 bits in groups against float64: the references and their backends' shared definition."""

from __future__ import annotations

import pytest
import torch

from lowbit.ops import w8a16
from lowbit.ops.cpu import w8a16 as cpu_w8a16
from lowbit.ops.integer_groups import dequantize_groups, quantize_per_group
from tests.support import calls


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_value_is_near_what_its_code_stands_for(bits: int, symmetric: bool) -> None:
    weight = torch.randn(5, 128) + 0.3
    weight[0], weight[1, 7] = 0, 50.0
    weight[2] = weight[2].abs()
    codes, scale, zero = quantize_per_group(weight, bits, 32, symmetric, torch.float16)
    assert int(codes.max()) < 2**bits
    assert scale.dtype == torch.float16
    decoded = dequantize_groups(codes, scale, zero)
    step = scale.double().repeat_interleave(32, dim=1)
    # Half a step of rounding, half of the largest value or of the zero point, and float16's rounding of the scale.
    allowed = (1.0 + 2**bits * 2**-11) * step
    assert ((decoded.double() - weight.double()).abs() <= allowed).all()
    assert not decoded[0].any()


@pytest.mark.parametrize("module", [w8a16, cpu_w8a16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 7, 70])
@pytest.mark.parametrize("zero_dtype", [None, torch.int16, torch.float32])
@pytest.mark.parametrize("groups", [1, 3])
def test_product_is_that_of_the_decoded_weight(
    module: object, dtype: torch.dtype, rows: int, zero_dtype: torch.dtype | None, groups: int
) -> None:
    weight = torch.randint(-128, 128, (40, 96), dtype=torch.int8)
    scale = (torch.rand(40, groups) + 0.1) / 100
    zero = None if zero_dtype is None else torch.randint(-128, 129, (40, groups)).to(zero_dtype)
    x, bias = torch.randn(rows, 96).to(dtype), torch.randn(40).to(dtype)
    size = 96 // groups
    wide = weight.double() - (0 if zero is None else zero.double().repeat_interleave(size, 1))
    decoded = wide * scale.double().repeat_interleave(size, 1)
    expected = x.double() @ decoded.t() + bias.double()
    result = calls.linear(module, x, weight, scale, bias, zero)
    assert result.dtype == dtype
    magnitude = x.double().abs() @ ((weight.double().abs() + 128) * scale.double().repeat_interleave(size, 1)).t()
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-22
    assert ((result.double() - expected).abs() <= rounding * (magnitude + bias.double().abs())).all()


def test_operator_is_well_formed() -> None:
    weight, scale = torch.randint(-128, 128, (8, 64), dtype=torch.int8), torch.rand(8, 2)
    zero = torch.zeros(8, 2, dtype=torch.int16)
    torch.library.opcheck(w8a16.product_operator, (torch.randn(5, 64), weight, scale, torch.randn(8), zero))
