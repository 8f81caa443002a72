from __future__ import annotations

import pytest
import torch

from lowbit.ops import w4a4, w4a4_weight_only, w4a16
from tests.support import calls


def signed(codes: torch.Tensor) -> torch.Tensor:
    """Codes [N, K] of bytes [N, K / 2], from the definition."""
    low, high = codes.int() & 15, codes.int() >> 4
    values = torch.stack([low, high], dim=-1).flatten(1)
    return torch.where(values >= 8, values - 16, values).double()


@pytest.fixture
def weight() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randint(0, 256, (24, 64), dtype=torch.uint8), torch.rand(24, 2).bfloat16()


def test_the_decoder_is_the_definition(weight: tuple[torch.Tensor, torch.Tensor]) -> None:
    codes, scale = weight
    expected = signed(codes) * scale.double().repeat_interleave(64, dim=1)
    assert torch.equal(w4a4.dequantize_w4(codes, scale).double(), expected)


def test_packing_is_undone_and_may_overwrite(weight: tuple[torch.Tensor, torch.Tensor]) -> None:
    codes = weight[0]
    packed = w4a4.pack_weight(codes)
    assert packed.dtype == torch.int8  # which tells it from what it was made of
    assert torch.equal(w4a16.unpack_int4(packed.view(torch.uint8)).double() - 8, signed(codes))
    assert torch.equal(w4a4.unpack_weight(packed), codes)
    copy = codes.clone()
    assert w4a4.pack_weight(copy, overwrite=True).data_ptr() == copy.data_ptr()
    assert torch.equal(copy.view(torch.int8), packed)


@pytest.mark.parametrize("rows", [1, 7])
def test_both_products_against_float64(weight: tuple[torch.Tensor, torch.Tensor], rows: int) -> None:
    codes, scale = weight
    x = torch.randn(rows, 128)
    x[0, 5] = 50
    bias = torch.randn(24)
    decoded = signed(codes) * scale.double().repeat_interleave(64, dim=1)
    packed = w4a4.pack_weight(codes)
    plain = x.double() @ decoded.t() + bias.double()
    assert torch.allclose(calls.linear(w4a4_weight_only, x, packed, scale, bias).double(), plain, atol=1e-3)
    groups = x.double().unflatten(1, (2, 64))
    steps = (groups.float().abs().amax(-1, keepdim=True) / 7).double()
    rounded = ((groups / steps).round() * steps).flatten(1)
    expected = rounded @ decoded.t() + bias.double()
    assert torch.allclose(calls.linear(w4a4, x, packed, scale, bias).double(), expected, atol=1e-3)
    assert not torch.allclose(plain, expected, atol=1e-1)


def test_rows_of_zeros_and_values_that_are_not_finite(weight: tuple[torch.Tensor, torch.Tensor]) -> None:
    codes, scale = weight
    x = torch.zeros(3, 128)
    x[1, 3], x[2, 70] = torch.inf, torch.nan
    result = calls.linear(w4a4, x, w4a4.pack_weight(codes), scale, None)
    assert torch.equal(result[0], torch.zeros(24))
    assert result[1:].isnan().all()


def test_quantizing_rounds_to_the_nearest_code() -> None:
    torch.manual_seed(1)
    weight = torch.randn(8, 128)
    codes, scale = w4a4.quantize_weight(weight)
    decoded = w4a4.dequantize_w4(codes, scale)
    step = scale.float().repeat_interleave(64, dim=1)
    inside = (weight / step).abs() < 7
    assert ((decoded - weight).abs() <= step / 2 + 1e-6)[inside].all()


def test_the_operator() -> None:
    codes = torch.randint(0, 256, (8, 64), dtype=torch.uint8)
    torch.library.opcheck(
        torch.ops.lowbit.w4a4_mm.default, (torch.randn(3, 128), codes, torch.rand(8, 2), torch.randn(8))
    )
