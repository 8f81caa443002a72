"""FP8 weights on CPUs against float64 products of the decoded weight."""

from __future__ import annotations

import pytest
import torch

from lowbit.ops import fp8, fp8_weight_only
from lowbit.ops.cpu import blocked, features
from lowbit.ops.cpu import fp8 as weight_only
from lowbit.ops.cpu import weight_only as products
from lowbit.ops.dispatch import Problem
from tests.support import calls

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One rounding of the result in float32; the weight is rounded too where products are made in 16 bits.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
BLOCKS = [None, (128, 128), (16, 100), (48, 70)]


def quantized(features_: int, columns: int, block: tuple[int, int] | None) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randn(features_, columns) / 8
    return fp8.quantize_fp8_per_token(weight) if block is None else fp8.quantize_fp8_per_block(weight, block)


def assert_close(
    result: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    size = x.double().abs() @ weight.double().abs().t()  # of the sums' terms, which bounds the errors of summing
    bound = BOUNDS[result.dtype] * (exact.abs() + size / 4)
    assert ((result.double() - exact).abs() <= bound + 1e-7).all()


@pytest.fixture(params=["own", "float32"])
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Multiply in the activations' precision, as on CPUs with instructions for it, or in float32."""
    chosen: str = request.param
    monkeypatch.setattr(
        products, "fast_matmul_dtype", (lambda dtype: dtype) if chosen == "own" else (lambda dtype: torch.float32)
    )
    return chosen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64, 32), (7, 333, 100), (513, 256, 130)])
@pytest.mark.parametrize("block", BLOCKS)
def test_agrees_with_float64(
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    block: tuple[int, int] | None,
    path: str,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocked, "DECODED_BYTES", 1 << 16)  # several blocks of channels
    rows, columns, features_ = shape
    x, bias = torch.randn(rows, columns).to(dtype), torch.randn(features_).to(dtype)
    packed, scale = quantized(features_, columns, block)
    weight = fp8.dequantize_fp8(packed, scale, block)
    for given in (None, bias):
        result = calls.linear(weight_only, x, calls.packed(weight_only, packed), scale, given, None, block)
        assert result.dtype == dtype
        assert_close(result, x, weight, given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("first", [0, 5, 64])
def test_rows_decode_as_the_reference_does(
    dtype: torch.dtype, block: tuple[int, int] | None, first: int, path: str
) -> None:
    packed, scale = quantized(150, 210, block)
    output = torch.empty(80, 210, dtype=dtype)
    weight_only.decode_rows(packed, scale, block, first, output)
    assert torch.equal(output, fp8.dequantize_fp8(packed, scale, block, dtype)[first : first + 80])


def test_one_scale_for_the_whole_weight(path: str) -> None:
    x, packed = torch.randn(3, 64), torch.randn(100, 64).to(fp8.E4M3)
    for scale in (torch.tensor(0.3), torch.tensor([0.3]), torch.tensor([[0.3]])):
        assert_close(calls.linear(weight_only, x, packed, scale, None), x, packed.float() * 0.3, None)


def test_every_code(path: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(fp8.E4M3).reshape(256, 1)
    result = calls.linear(weight_only, torch.ones(1, 1), codes, torch.ones(256, 1), None)
    expected = codes.float().t()
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poisoned_rows_and_only_they_are_not_finite(poison: float, path: str) -> None:
    x = torch.randn(4, 64)
    x[2, 5] = poison
    result = calls.linear(weight_only, x, *quantized(8, 64, None), None)
    assert not result[2].isfinite().any()
    assert result[[0, 1, 3]].isfinite().all()


def test_leading_dimensions_strides_and_transposed_weights(path: str) -> None:
    packed, scale = quantized(8, 64, None)
    packed = calls.packed(weight_only, packed.t().contiguous().t())
    x = torch.randn(64, 3, 2).permute(2, 1, 0)
    expected = calls.linear(fp8_weight_only, x, packed, scale, None)
    torch.testing.assert_close(calls.linear(weight_only, x, packed, scale, None), expected)


def test_compiles(path: str) -> None:
    packed, scale = quantized(40, 64, (16, 16))
    torch.compiler.reset()
    compiled = torch.compile(calls.function(weight_only), fullgraph=True)
    x = torch.randn(5, 64).bfloat16()
    expected = calls.linear(weight_only, x, packed, scale, None, None, (16, 16))
    torch.testing.assert_close(compiled(x, packed, scale, None, None, (16, 16)), expected)


def test_operator_is_well_formed() -> None:
    packed, scale = quantized(8, 64, None)
    arguments = (torch.randn(5, 64), packed, scale, torch.randn(8))
    checks = ("test_autograd_registration", "test_faketensor")  # torch can't compare e4m3 for the others
    torch.library.opcheck(fp8_weight_only.product_operator, arguments, test_utils=checks)


def test_float32_is_never_multiplied_in_less() -> None:
    assert features.fast_matmul_dtype(torch.float32) == torch.float32
    assert "float64" in (weight_only.can_run(Problem(torch.device("cpu"), torch.float64, 8, 8)) or "")
