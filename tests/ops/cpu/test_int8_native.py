"""The native implementation of int8 against the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch

from lowbit.ops import int8
from lowbit.ops.cpu import helper, int8_native
from lowbit.ops.dispatch import Problem
from lowbit.ops.weight_format import Prepared
from tests.support import calls
from tests.support.cpu import at_the_end_of_memory, awkward, same

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REFUSAL = int8_native.can_run(Problem(CPU, torch.float32, 64, 64))
NEEDS_KERNEL = pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))
pytestmark = pytest.mark.usefixtures("vectors_or_tiles")


def quantized_layer(features: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return int8.quantize_int8_per_token(torch.randn(features, columns) / 8)


@NEEDS_KERNEL
def test_a_dense_weight_is_read_where_it_is() -> None:
    weight = torch.randint(-128, 128, (16, 64), dtype=torch.int8)
    assert calls.packed(int8_native, weight).data_ptr() == weight.data_ptr()
    doubled = torch.stack([weight, weight], dim=2)[..., 0]  # not dense
    assert torch.equal(calls.unpacked(int8_native, calls.packed(int8_native, doubled)), weight)


@NEEDS_KERNEL
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("features", [16, 48, 96, 192])
def test_equals_the_reference_with_any_rest_of_rows_and_panels(
    dtype: torch.dtype, has_bias: bool, features: int
) -> None:
    weight, scale = quantized_layer(features, 100)
    packed = calls.packed(int8_native, weight)
    bias = torch.randn(features).to(dtype) if has_bias else None
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 23, 32, 33, 48, 49, 64, 65, 300):
        x = awkward(rows, 100, dtype)
        assert same(calls.linear(int8_native, x, packed, scale, bias), calls.linear(int8, x, weight, scale, bias))


@NEEDS_KERNEL
@pytest.mark.parametrize("rows", [1, 3, 9, 40])
@pytest.mark.parametrize("columns", [4, 60, 64, 4096, 4100, 9000])
def test_equals_the_reference_at_any_depth(columns: int, rows: int) -> None:
    weight, scale = quantized_layer(80, columns)
    x = awkward(rows, columns, torch.bfloat16)
    result = calls.linear(int8_native, x, calls.packed(int8_native, weight), scale, None)
    assert same(result, calls.linear(int8, x, weight, scale, None))


@NEEDS_KERNEL
@pytest.mark.parametrize("rows", [1, 8, 20, 40, 100])
@pytest.mark.parametrize("columns", [60, 128, 324])
def test_reads_nothing_beyond_a_weight(columns: int, rows: int) -> None:
    weight, scale = quantized_layer(48, columns)
    x = torch.randn(rows, columns).bfloat16()
    last = at_the_end_of_memory(weight), at_the_end_of_memory(scale)
    assert same(calls.linear(int8_native, x, *last, None), calls.linear(int8, x, weight, scale, None))


@NEEDS_KERNEL
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_work_is_divided_without_loss(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows = 1452  # more than are quantized at once
        weight, scale = quantized_layer(208, 64)
        x = torch.randn(rows, 64)
        result = calls.linear(int8_native, x, calls.packed(int8_native, weight), scale, None)
        assert same(result, calls.linear(int8, x, weight, scale, None))
    finally:
        torch.set_num_threads(before)


@NEEDS_KERNEL
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_sums_are_exact(sign: int) -> None:
    columns = int8_native.LARGEST_IN_FEATURES
    x = torch.full((7, columns), 127.0)
    x[:, 0] = 126.0
    weight = torch.full((16, columns), 127 if sign > 0 else -128, dtype=torch.int8)
    one = torch.ones(16, 1)
    result = calls.linear(int8_native, x, calls.packed(int8_native, weight), one, None)
    assert same(result, calls.linear(int8, x, weight, one, None))


@NEEDS_KERNEL
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_poisoned_rows_and_only_they_give_nan(poison: float) -> None:
    x = torch.randn(4, 64)
    x[2, 5] = poison
    weight, scale = quantized_layer(16, 64)
    result = calls.linear(int8_native, x, calls.packed(int8_native, weight), scale, None)
    assert result[2].isnan().all()
    assert result[[0, 1, 3]].isfinite().all()


@NEEDS_KERNEL
def test_leading_dimensions_strides_and_no_rows() -> None:
    weight, scale = quantized_layer(16, 64)
    packed = calls.packed(int8_native, weight)
    for x in (torch.randn(64, 3, 2).permute(2, 1, 0), torch.randn(2, 3, 64), torch.randn(5, 99)[:, 3:67]):
        assert same(calls.linear(int8_native, x, packed, scale, None), calls.linear(int8, x, weight, scale, None))
    assert calls.linear(int8_native, torch.randn(0, 64), packed, scale, None).shape == (0, 16)


class Block(torch.nn.Module):
    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(calls.packed(int8_native, weight), requires_grad=False)
        self.scale = torch.nn.Parameter(scale, requires_grad=False)
        self.bias = torch.nn.Parameter(torch.randn(scale.shape[0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return calls.linear(int8_native, torch.nn.functional.silu(x), self.weight, self.scale, self.bias) + x


@NEEDS_KERNEL
def test_compiled_blocks_agree() -> None:
    block = Block(*quantized_layer(64, 64))
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True)
    with torch.no_grad():
        for rows in (3, 17):
            x = torch.randn(2, rows, 64)
            torch.testing.assert_close(compiled(x), block(x), rtol=0.02, atol=0.02)  # silu may round to another code


@NEEDS_KERNEL
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 2, 70, 1200])
def test_several_layers_of_one_input_are_what_each_is(rows: int, dtype: torch.dtype) -> None:
    layers = [quantized_layer(features, 100) for features in (16, 208, 96)]
    bias = [None, torch.randn(208).to(dtype), None]
    x = awkward(max(rows, 16), 100, dtype)[:rows]
    weights, scales = [weight for weight, _ in layers], [scale for _, scale in layers]
    for result, (weight, scale), b in zip(
        int8_native.linears(x, calls.layers(weights, scales), bias), layers, bias, strict=True
    ):
        assert same(result, calls.linear(int8_native, x, weight, scale, b))


@NEEDS_KERNEL
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "features"),
    [(1, 64, 16), (3, 100, 48), (8, 4100, 208), (16, 256, 32), (33, 4100, 208), (70, 4100, 208), (1200, 100, 96)],
)
def test_gated_layers_against_float64(rows: int, columns: int, features: int, dtype: torch.dtype) -> None:
    layers = [quantized_layer(features, columns) for _ in range(2)]
    weights, scales = [weight for weight, _ in layers], [scale for _, scale in layers]
    bias = [torch.randn(features).to(dtype), None]
    x = torch.randn(2, rows, columns).to(dtype)
    result = int8_native.gated_linear(x, calls.layers(weights, scales), bias)
    gate, value = (
        calls.linear(int8, x.float(), *layer, None if b is None else b.float()).double()
        for layer, b in zip(layers, bias, strict=True)
    )
    expected = torch.nn.functional.silu(gate) * value
    rounding = torch.finfo(dtype).eps / 2
    # Without AMX both results are rounded first: gate, value and their product, and what silu makes of the gate's.
    allowed = 4 * rounding * expected.abs() + rounding * (gate * value).abs() + 4e-6 * value.abs().amax()
    assert bool(((result.double() - expected).abs() <= allowed).all())
    assert result.dtype == dtype


@NEEDS_KERNEL
def test_gated_layers_pass_on_what_is_not_finite() -> None:
    layers = [quantized_layer(16, 64) for _ in range(2)]
    x = torch.randn(6, 64)
    x[1, 3], x[2, 5], x[3, 7] = torch.nan, torch.inf, -torch.inf
    result = int8_native.gated_linear(x, [Prepared(*layer) for layer in layers], [None, None])
    assert result.isfinite().all(dim=1).tolist() == [True, False, False, False, True, True]


@NEEDS_KERNEL
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operator_is_well_formed(dtype: torch.dtype) -> None:
    weight, scale = quantized_layer(32, 64)
    x = torch.randint(1, 256, (5, 64), dtype=torch.uint8)
    arguments = (x, torch.rand(5, 1), calls.packed(int8_native, weight), scale, torch.randn(32), dtype)
    torch.library.opcheck(int8_native.product_operator, arguments)
    several = ([calls.packed(int8_native, weight)] * 2, [scale] * 2, [torch.randn(32), None])
    for are_gated in (False, True):
        torch.library.opcheck(int8_native.multiply_operator, (torch.randn(5, 64, dtype=dtype), *several, are_gated))


def test_refuses_what_it_cannot_do(path: str) -> None:
    def refusal(dtype: torch.dtype, features: int, columns: int) -> str:
        return int8_native.can_run(Problem(CPU, dtype, features, columns)) or ""

    if path == "torch":
        assert refusal(torch.float32, 64, 64) == "native helper turned off by LOWBIT_NATIVE=0"
    elif helper.multiplies_int8():
        assert not refusal(torch.float32, 64, 64)
        assert "float64" in refusal(torch.float64, 64, 64)
        assert "multiples of 16" in refusal(torch.float32, 100, 64)
        assert "multiples of 4" in refusal(torch.float32, 64, 66)
        assert "overflow" in refusal(torch.float32, 64, 1 << 18)
    else:
        assert "AVX512-VNNI" in refusal(torch.float32, 64, 64)


@NEEDS_KERNEL
def test_two_weights_at_one_address_are_not_taken_for_each_other() -> None:
    x = torch.randn(40, 64)
    weight, scale = quantized_layer(64, 64)
    for _ in range(3):
        weight.copy_(torch.randint(-127, 128, weight.shape, dtype=torch.int8))
        assert same(calls.linear(int8_native, x, weight, scale, None), calls.linear(int8, x, weight, scale, None))
