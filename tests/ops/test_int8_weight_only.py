from __future__ import annotations

import pytest
import torch

from lowbit.ops import int8_weight_only as reference
from lowbit.ops.cpu import int8_weight_only as cpu
from lowbit.ops.int8 import IMPLEMENTATIONS, quantize_int8_per_token
from tests.support import calls

# Half a unit in the last place of the result.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}

SHAPES = [(1, 64, 64), (5, 192, 128), (1, 64, 96), (1, 200, 51), (3, 33, 7), (32, 64, 16), (40, 200, 51), (0, 16, 8)]


def layer(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_int8_per_token(torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)))


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_product_against_float64(dtype: torch.dtype, m: int, k: int, n: int, has_bias: bool) -> None:
    weight, scale = layer(n, k)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(9)).to(dtype) if has_bias else None
    exact = x.double() @ (weight.double() * scale.double()).t() + (0 if bias is None else bias.double())
    magnitude = x.double().abs() @ (weight.double() * scale.double()).abs().t() + 1
    # The CPU's kernels round a sum or the decoded weight to the activations' dtype too.
    for function, extra in ((reference.int8_weight_only_mm, 0.0), (cpu.int8_weight_only_mm, ROUNDING[dtype])):
        result = function(x, weight, scale, bias)
        assert result.dtype == dtype
        error = (result.double() - exact).abs()
        assert (error <= ROUNDING[dtype] * exact.abs() + (1e-6 + extra) * magnitude).all()


@pytest.mark.parametrize("m", [1, 40])
def test_bad_rows_stay_apart(m: int) -> None:
    weight, scale = layer(24, 64)
    x = torch.randn(m + 3, 64).bfloat16()
    x[0, 3], x[1, 5], x[2] = torch.nan, torch.inf, 0
    result = calls.linear(reference, x, weight, scale, None)
    assert result[0].isnan().all()
    assert not result[1].isfinite().any()
    assert (result[2] == 0).all()
    assert result[3:].isfinite().all()


def test_inputs_of_many_dimensions_and_strides() -> None:
    weight, scale = layer(24, 64)
    x = torch.randn(2, 64, 5).bfloat16().transpose(1, 2)
    torch.testing.assert_close(
        calls.linear(reference, x, weight, scale, None), calls.linear(reference, x.contiguous(), weight, scale, None)
    )


def test_the_operator_is_well_formed() -> None:
    weight, scale = layer(24, 64)
    torch.library.opcheck(reference.product_operator, (torch.randn(2, 64).bfloat16(), weight, scale, None))


def test_auto_never_chooses_it() -> None:
    assert not any(entry.automatic for entry in IMPLEMENTATIONS if entry.name == "weight_only")
