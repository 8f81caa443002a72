"""Products of activations and 8- or 4-bit weights on CPUs against float64 products of the decoded weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
import torch

from lowbit.ops import fp8, int8, int8_weight_only, w4a16
from lowbit.ops.cpu import fp8 as cpu_fp8
from lowbit.ops.cpu import helper, weight_only
from lowbit.ops.cpu import w4a16 as cpu_w4a16
from lowbit.ops.dispatch import Problem
from tests.support import calls
from tests.support.cpu import awkward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
NEEDS_NATIVE = pytest.mark.skipif(helper.refusal() is not None, reason=f"native helper {helper.refusal()}")
SHAPES = [(1, 64, 32), (3, 576, 9), (7, 333, 101), (2, 1312, 21), (4, 1312, 10), (64, 1280, 40), (65, 640, 33)]

Layer = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # The matrices here are so small that a second thread is only waited for.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _fp8_linear(
    values: torch.Tensor,
    scales: torch.Tensor,
    block: tuple[int, int] | None,
    x: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return calls.linear(cpu_fp8, x, values, scales, bias, None, block)


def _w4a16_linear(tensors: Sequence[torch.Tensor], x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    packed, scale, zero = tensors
    return calls.linear(cpu_w4a16, x, packed, scale, bias, zero)


def eight_bit_layers(weight: torch.Tensor) -> Iterator[tuple[Layer, torch.Tensor]]:
    """Layers of a weight [N, K] in all 8-bit formats, each with the weight that it stands for."""
    codes, scale = int8.quantize_int8_per_token(weight)
    yield lambda x, bias: calls.linear(int8_weight_only, x, codes, scale, bias), codes * scale
    for block in (None, (16, 100), (128, 128)):
        values, scales = (
            fp8.quantize_fp8_per_token(weight) if block is None else fp8.quantize_fp8_per_block(weight, block)
        )
        yield (
            partial(_fp8_linear, values, scales, block),
            fp8.dequantize_fp8(values, scales, block),
        )


def four_bit_layers(weight: torch.Tensor) -> Iterator[tuple[Layer, torch.Tensor]]:
    """The same in 4 bits, with the group sizes that divide K."""
    for group_size in (size for size in (32, 64, 128) if weight.shape[1] % size == 0):
        for symmetric, scale_dtype in ((True, torch.float32), (False, torch.bfloat16)):
            tensors = w4a16.quantize_int4_per_group(weight, group_size, symmetric, scale_dtype)
            yield (
                partial(_w4a16_linear, tensors),
                w4a16.dequantize_int4(*tensors),
            )


def check(layer: Layer, weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> None:
    """A float32 sum of K products, rounded once; where products are made in 16 bits the weight is rounded too."""
    result = layer(x, bias)
    assert result.dtype == x.dtype
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    size = x.double().abs() @ weight.double().abs().t() + (0 if bias is None else bias.double().abs())
    in_own_dtype = x.dtype != torch.float32 and not weight_only.has_few_rows(x)
    is_fast = vars(weight_only)["fast_matmul_dtype"](x.dtype) == x.dtype
    summing = ROUNDING[x.dtype] if in_own_dtype and is_fast else 2e-6
    assert ((result.double() - exact).abs() <= ROUNDING[x.dtype] * exact.abs() + summing * size + 1e-7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_float64(dtype: torch.dtype, shape: tuple[int, int, int], path: str) -> None:
    rows, columns, features = shape
    weight, bias = torch.randn(features, columns) / 8, torch.randn(features).to(dtype)
    weight[0] = 0
    for layer, decoded in (*eight_bit_layers(weight), *four_bit_layers(weight)):
        for given in (None, bias):
            check(layer, decoded, awkward(rows, columns, torch.float32).clamp(-100, 100).to(dtype), given)


@NEEDS_NATIVE
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_float64_on_every_isa(dtype: torch.dtype, isa: str) -> None:
    for rows, columns, features in SHAPES[:6]:
        weight = torch.randn(features, columns) / 8
        for layer, decoded in (*eight_bit_layers(weight), *four_bit_layers(weight)):
            check(layer, decoded, torch.randn(rows, columns).to(dtype), None)


@NEEDS_NATIVE
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_work_is_divided_without_loss(threads: int) -> None:
    torch.set_num_threads(threads)
    weight = torch.randn(611, 512)
    for layer, decoded in (*eight_bit_layers(weight), *four_bit_layers(weight)):
        check(layer, decoded, torch.randn(5, 512), None)


@NEEDS_NATIVE
def test_every_e4m3_code_decodes(isa: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(fp8.E4M3).reshape(256, 1).repeat(1, 64)
    x = torch.zeros(1, 64)
    x[0, 40] = 1.0
    for scale in (1.0, 0.37):
        expected = codes.float()[:, 0] * scale
        result = calls.linear(cpu_fp8, x, codes, torch.full((256, 1), scale), None)[0]
        assert torch.equal(result.isnan(), expected.isnan())
        assert torch.equal(result.nan_to_num(), expected.nan_to_num())


@NEEDS_NATIVE
def test_scales_that_are_nearly_too_large_for_float32(isa: str) -> None:
    codes = torch.tensor([[1.0] * 64, [2.0] * 64]).to(fp8.E4M3)
    result = calls.linear(
        cpu_fp8, torch.ones(1, 64) / 64, codes, torch.full((2, 1), 2e36), None
    )  # 256 * 2e36 is no float32
    torch.testing.assert_close(result, torch.tensor([[2e36, 4e36]]))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poisoned_rows_and_only_they_are_not_finite(poison: float, path: str) -> None:
    x = torch.randn(5, 64)
    x[2, 63] = poison
    for layer, _ in (*eight_bit_layers(torch.randn(8, 64)), *four_bit_layers(torch.randn(8, 64))):
        result = layer(x, None)
        assert not result[2].isfinite().any()
        assert result[[0, 1, 3, 4]].isfinite().all()


def test_leading_dimensions_and_strides(path: str) -> None:
    x = torch.randn(64, 3, 2).permute(2, 1, 0)
    for layer, decoded in (*eight_bit_layers(torch.randn(8, 64)), *four_bit_layers(torch.randn(8, 64))):
        torch.testing.assert_close(layer(x, None), torch.nn.functional.linear(x, decoded))


def test_no_rows(path: str) -> None:
    for layer, _ in (*eight_bit_layers(torch.randn(8, 64)), *four_bit_layers(torch.randn(8, 64))):
        assert layer(torch.empty(0, 64), None).shape == (0, 8)


def test_sixteen_bit_matmul_is_taken_where_it_is_fast(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.dtype] = []

    def own(dtype: torch.dtype) -> torch.dtype:
        asked.append(dtype)
        return dtype

    monkeypatch.setattr(weight_only, "fast_matmul_dtype", own)
    weight, x, bias = torch.randn(40, 640) / 8, torch.randn(70, 640).bfloat16(), torch.randn(40).bfloat16()
    for layer, decoded in (*eight_bit_layers(weight), *four_bit_layers(weight)):
        asked.clear()
        layer(x, bias)
        assert asked or weight_only.takes_bfloat16(x)
        check(layer, decoded, x, bias)


def test_compiles(path: str) -> None:
    codes, scale = int8.quantize_int8_per_token(torch.randn(8, 64))
    packed, scales, zero = w4a16.quantize_int4_per_group(torch.randn(8, 64), 32, symmetric=False)
    x = torch.randn(3, 64)

    def both(x: torch.Tensor) -> torch.Tensor:
        return calls.linear(int8_weight_only, x, codes, scale, None) + calls.linear(
            cpu_w4a16, x, packed, scales, None, zero
        )

    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(both, fullgraph=True)(x), both(x))


def test_operators_are_well_formed() -> None:
    codes, scale = int8.quantize_int8_per_token(torch.randn(8, 64))
    torch.library.opcheck(int8_weight_only.product_operator, (torch.randn(5, 64), codes, scale, torch.randn(8)))
    packed, scales, zero = w4a16.quantize_int4_per_group(torch.randn(8, 64), 32, symmetric=False)
    torch.library.opcheck(w4a16.product_operator, (torch.randn(5, 64), packed, scales, torch.randn(8), zero))


def test_refuses_what_it_cannot_do() -> None:
    for module in (cpu_w4a16, cpu_fp8):
        assert "float64" in (module.can_run(Problem(torch.device("cpu"), torch.float64, 8, 64)) or "")
