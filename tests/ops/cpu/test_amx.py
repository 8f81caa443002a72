"""Products in bfloat16 by AMX, and weights decoded for them, against the references and float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lowbit.ops import fp8, int8, w4a16
from lowbit.ops.cpu import fp8 as cpu_fp8
from lowbit.ops.cpu import gguf_native, int8_weight_only, native, weight_only
from lowbit.ops.cpu import w4a16 as cpu_w4a16
from lowbit.ops.gguf import QUANTIZABLE_TYPES, gguf_dequantize, gguf_quantize
from lowbit.ops.gguf_types import block_type
from tests.ops.cpu.test_four_bits import FORMATS, Layer

pytestmark = pytest.mark.skipif(not native.multiplies_bfloat16(), reason="the CPU has no AMX")

ROWS = 9
BF16 = block_type("BF16").number  # weights as they are


def one_input_a_row(columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x [rows, columns] of which each row picks one input, so that there is nothing to sum, and the inputs."""
    inputs = torch.randperm(columns, generator=torch.Generator().manual_seed(0))[:ROWS]
    inputs[0] = columns - 1
    x = torch.zeros(ROWS, columns, dtype=torch.bfloat16)
    x[torch.arange(ROWS), inputs] = 1.0
    assert weight_only.is_for_amx(x)
    return x, inputs


@pytest.mark.parametrize("columns", [32, 1046, 1312, 2048, 4704])
@pytest.mark.parametrize("kind", FORMATS)
def test_four_and_eight_bits_are_decoded_as_by_the_reference(kind: str, columns: int) -> None:
    layer = Layer(kind, 37, columns)
    x, inputs = one_input_a_row(columns)
    assert torch.equal(layer.linear(x), layer.weight().bfloat16()[:, inputs].t())


@pytest.mark.parametrize("columns", [64, 333, 2048, 5000])
def test_eight_bits_with_scales_of_any_shape(columns: int) -> None:
    weight = torch.randn(70, columns)
    x, inputs = one_input_a_row(columns)
    codes, scale = int8.quantize_int8_per_token(weight)
    result = int8_weight_only.int8_weight_only_mm(x, codes, scale, None)
    assert torch.equal(result, (codes * scale).bfloat16()[:, inputs].t())
    for block in (None, (16, 100), (128, 128), (1, 32)):
        values, scales = (
            fp8.quantize_fp8_per_token(weight) if block is None else fp8.quantize_fp8_per_block(weight, block)
        )
        decoded = fp8.dequantize_fp8(values, scales, block).bfloat16()
        assert torch.equal(cpu_fp8.fp8_weight_only_mm(x, values, scales, None, block), decoded[:, inputs].t())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 4608])
def test_four_bits_in_groups(group_size: int, symmetric: bool) -> None:
    columns = 4608
    x, inputs = one_input_a_row(columns)
    packed, scale, zero = w4a16.quantize_int4_per_group(torch.randn(21, columns), group_size, symmetric)
    decoded = w4a16.dequantize_int4(packed, scale, zero).bfloat16()
    assert torch.equal(cpu_w4a16.w4a16_mm(x, packed, scale, None, zero), decoded[:, inputs].t())


@pytest.mark.parametrize("kind", QUANTIZABLE_TYPES)
def test_gguf_is_decoded_as_by_the_reference(kind: str) -> None:
    columns = 2304  # more than is packed at once
    x, inputs = one_input_a_row(columns)
    raw = gguf_quantize(torch.randn(35, columns) / 8, kind)
    result = gguf_native.multiply_native(x, raw, kind)
    assert torch.equal(result, gguf_dequantize(raw, kind).bfloat16()[:, inputs].t())


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("rows", "features", "columns"), [(1, 1, 1), (5, 33, 64), (33, 208, 260), (70, 401, 4700), (4130, 16, 32)]
)
def test_products_agree_with_float64(rows: int, features: int, columns: int, threads: int) -> None:
    x = torch.randn(rows, columns).bfloat16()
    weight, bias = torch.randn(features, columns).bfloat16(), torch.randn(features)
    for given in (None, bias):
        output = torch.empty(rows, features, dtype=torch.bfloat16)
        native.gguf_product(x, weight.view(torch.uint8), BF16, given, output)
        exact = x.double() @ weight.double().t() + (0 if given is None else given.double())
        size = x.double().abs() @ weight.double().abs().t()
        assert ((output.double() - exact).abs() <= 2.0**-8 * exact.abs() + 2e-6 * size).all()


def test_rows_that_are_apart() -> None:
    x = torch.randn(40, 200).bfloat16()[:, :96]
    codes, scale = int8.quantize_int8_per_token(torch.randn(50, 96))
    expected = int8_weight_only.int8_weight_only_mm(x.contiguous(), codes, scale, None)
    assert torch.equal(int8_weight_only.int8_weight_only_mm(x, codes, scale, None), expected)


def test_what_is_not_finite_stays_in_its_row_and_channel() -> None:
    x, weight = torch.randn(40, 96).bfloat16(), torch.randn(50, 96).bfloat16()
    x[3, 5], weight[7, 90] = float("nan"), float("inf")
    output = torch.empty(40, 50, dtype=torch.bfloat16)
    native.gguf_product(x, weight.view(torch.uint8), BF16, None, output)
    bad = ~output.isfinite()
    assert bad[3].all()
    assert bad[:, 7].all()
    bad[3], bad[:, 7] = False, False
    assert not bad.any()
