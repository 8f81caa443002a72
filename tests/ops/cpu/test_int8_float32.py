"""The implementation of int8 for any CPU against the reference."""

from __future__ import annotations

import pytest
import torch

from lowbit.ops import int8
from lowbit.ops.cpu import int8_float32
from lowbit.ops.dispatch import Problem
from tests.support import calls
from tests.support.cpu import awkward, same

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64, 32), (7, 333, 100), (600, 256, 200)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_equals_the_reference(dtype: torch.dtype, shape: tuple[int, int, int], has_bias: bool, path: str) -> None:
    rows, columns, features = shape
    x = awkward(rows, columns, dtype)
    weight, scale = int8.quantize_int8_per_token(torch.randn(features, columns) / 8)
    bias = torch.randn(features).to(dtype) if has_bias else None
    result = calls.linear(int8_float32, x, calls.packed(int8_float32, weight), scale, bias)
    assert same(result, calls.linear(int8, x, weight, scale, bias))  # sums below 2**24 are exact in float32


def test_long_sums_are_as_good_as_float32(path: str) -> None:
    x = torch.randn(3, 20_000)
    weight, scale = int8.quantize_int8_per_token(torch.randn(300, 20_000))
    expected = calls.linear(int8, x, weight, scale, None)
    torch.testing.assert_close(calls.linear(int8_float32, x, weight, scale, None), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poisoned_rows_and_only_they_give_nan(poison: float, path: str) -> None:
    x = torch.randn(4, 64)
    x[2, 5] = poison
    result = calls.linear(int8_float32, x, *int8.quantize_int8_per_token(torch.randn(8, 64)), None)
    assert result[2].isnan().all()
    assert result[[0, 1, 3]].isfinite().all()


def test_leading_dimensions_strides_and_transposed_weights(path: str) -> None:
    weight, scale = int8.quantize_int8_per_token(torch.randn(8, 64))
    packed = calls.packed(int8_float32, weight.t().contiguous().t())
    assert torch.equal(calls.unpacked(int8_float32, packed), weight)
    x = torch.randn(64, 3, 2).permute(2, 1, 0)
    assert same(calls.linear(int8_float32, x, packed, scale, None), calls.linear(int8, x, weight, scale, None))


def test_compiles(path: str) -> None:
    weight, scale = int8.quantize_int8_per_token(torch.randn(8, 64))
    torch.compiler.reset()
    compiled = torch.compile(calls.function(int8_float32), fullgraph=True)
    x = torch.randn(5, 64)
    torch.testing.assert_close(compiled(x, weight, scale, None), calls.linear(int8, x, weight, scale, None))


def test_operator_is_well_formed() -> None:
    weight, scale = int8.quantize_int8_per_token(torch.randn(8, 64))
    x = torch.randint(-127, 128, (5, 64), dtype=torch.int8)
    arguments = (x, torch.rand(5, 1), weight, scale, torch.randn(8), torch.bfloat16)
    torch.library.opcheck(int8_float32.product_operator, arguments)


def test_refuses_what_it_cannot_do() -> None:
    assert "float64" in (int8_float32.can_run(Problem(torch.device("cpu"), torch.float64, 8, 8)) or "")
