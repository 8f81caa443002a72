from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from lowbit.ops import fp8, int8
from lowbit.ops import fp8_weight_only as fp8_reference
from lowbit.ops.int8_weight_only import int8_weight_only_mm as reference
from lowbit.ops.triton import fp8_weight_only, int8_weight_only
from tests.support import calls

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 512, 40), (1, 300, 33), (19, 100, 7)])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_product_against_float64(device: torch.device, dtype: torch.dtype, m: int, k: int, n: int, kind: str) -> None:
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16's bits")
    generator = torch.Generator().manual_seed(k)
    source = torch.randn(n, k, generator=generator)
    weight, scale = int8.quantize_int8_per_token(source) if kind == "int8" else fp8.quantize_fp8_per_token(source)
    x, bias = torch.randn(m, k, generator=generator).to(dtype), torch.randn(n, generator=generator).to(dtype)
    function = int8_weight_only.int8_weight_only_mm if kind == "int8" else fp8_weight_only.fp8_weight_only_mm
    result = function(x.to(device), weight.to(device), scale.to(device), bias.to(device)).cpu()
    exact = x.double() @ (weight.double() * scale.double()).t() + bias.double()
    magnitude = x.double().abs() @ (weight.double() * scale.double()).abs().t() + bias.double().abs()
    assert result.dtype == dtype
    assert ((result.double() - exact).abs() <= BOUNDS[dtype] * exact.abs() + 1e-6 * magnitude).all()


def test_many_rows_take_the_decoded_weight(device: torch.device) -> None:
    weight, scale = int8.quantize_int8_per_token(torch.randn(24, 64))
    x = torch.randn(int8_weight_only.MOST_ROWS + 1, 64)
    actual = int8_weight_only.int8_weight_only_mm(x.to(device), weight.to(device), scale.to(device), None)
    torch.testing.assert_close(actual.cpu(), reference(x, weight, scale, None), rtol=1e-4, atol=1e-4)
    codes, scale = fp8.quantize_fp8_per_token(torch.randn(24, 64))
    actual = fp8_weight_only.fp8_weight_only_mm(x.to(device), codes.to(device), scale.to(device), None)
    torch.testing.assert_close(actual.cpu(), calls.linear(fp8_reference, x, codes, scale, None), rtol=1e-4, atol=1e-4)


def test_nan_and_infinity_reach_the_result(device: torch.device) -> None:
    weight, scale = int8.quantize_int8_per_token(torch.randn(24, 64))
    x = torch.zeros(2, 64)
    x[0, 3], x[1, 3] = torch.nan, torch.inf
    result = int8_weight_only.int8_weight_only_mm(x.to(device), weight.to(device), scale.to(device), None)
    assert not result.isfinite().any()
