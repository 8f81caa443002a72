"""MX and NVFP4 weights on CPUs against the references' decoding and float64 products."""

from __future__ import annotations

import pytest
import torch

from lowbit.ops import mx, mx_weight_only, nvfp4_weight_only
from lowbit.ops.cpu import blocked, native, weight_only
from lowbit.ops.cpu import mx as cpu_mx
from lowbit.ops.cpu import nvfp4 as cpu_nvfp4
from lowbit.ops.dispatch import Problem
from lowbit.ops.e2m1 import decode_e2m1_pairs
from tests.support.cpu import at_the_end_of_memory, same
from tests.support.four_bits import FORMATS, Layer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One rounding of the result in float32; the weight is rounded too where products are made in 16 bits.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@pytest.fixture(params=["own", "float32"])
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Multiply in the activations' precision, as on CPUs with instructions for it, or in float32."""
    chosen: str = request.param
    monkeypatch.setattr(
        weight_only, "fast_matmul_dtype", (lambda dtype: dtype) if chosen == "own" else (lambda dtype: torch.float32)
    )
    return chosen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64, 32), (7, 334, 100), (513, 256, 130)])
@pytest.mark.parametrize("kind", FORMATS)
def test_agrees_with_float64(
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    kind: str,
    path: str,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocked, "DECODED_BYTES", 1 << 16)  # several blocks of channels
    rows, columns, features = shape
    layer = Layer(kind, features, columns)
    x, bias = torch.randn(rows, columns).to(dtype), torch.randn(features).to(dtype)
    weight = layer.weight()
    for given in (None, bias):
        result = layer.linear(x, given)
        assert result.dtype == dtype
        exact = x.double() @ weight.double().t() + (0 if given is None else given.double())
        size = x.double().abs() @ weight.double().abs().t()
        assert ((result.double() - exact).abs() <= BOUNDS[dtype] * (exact.abs() + size / 4) + 1e-7).all()


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 64])
@pytest.mark.parametrize("columns", [32, 1046, 1312])
@pytest.mark.parametrize("kind", FORMATS)
def test_few_rows_on_every_isa(kind: str, columns: int, rows: int, isa: str) -> None:
    layer = Layer(kind, 19, columns)
    x, bias = torch.randn(rows, columns), torch.randn(19)
    assert weight_only.has_few_rows(x)
    weight = layer.weight().double()
    exact, size = x.double() @ weight.t() + bias, x.double().abs() @ weight.abs().t()
    assert ((layer.linear(x, bias).double() - exact).abs() <= 2e-6 * (exact.abs() + size)).all()


@pytest.mark.parametrize("kind", ["mxfp8", "mxfp4", "nvfp4"])
def test_every_scale_code_in_products_of_few_rows(kind: str, isa: str) -> None:
    layer = Layer(kind, 256, 32)
    packed, scale, *rest = layer.tensors
    codes = torch.arange(256, dtype=torch.uint8)[:, None].expand(scale.shape).contiguous()
    layer.tensors = (packed, codes.view(scale.dtype), *rest)
    x = torch.zeros(1, 32)
    x[0, 5] = 1.0  # one product a channel, so that there is nothing to round
    weight = layer.weight().float()
    representable = ~weight.isinf().any(dim=1)  # infinity times 0 is NaN, unless the scale is applied to the sum
    assert representable.sum() > 240
    assert same(layer.linear(x)[:, representable], weight[None, representable, 5])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["mxfp8", "mxfp4", "dualscale"])
@pytest.mark.parametrize("first", [0, 5, 64])
def test_rows_decode_as_the_reference_does(dtype: torch.dtype, kind: str, first: int, path: str) -> None:
    layer = Layer(kind, 150, 1044)
    packed, scale, *dual = layer.tensors
    output = torch.empty(80, 1044, dtype=dtype)
    cpu_mx.decode_rows(packed, scale, dual[0] if dual else None, first, output)
    assert torch.equal(output, layer.weight(dtype)[first : first + 80])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [16, 32, 50])
def test_every_byte_decodes_on_every_isa(dtype: torch.dtype, group_size: int, isa: str) -> None:
    packed = torch.arange(256, dtype=torch.uint8).repeat(3, 1)
    scale = torch.randn(3, -(-512 // group_size)).exp()
    scale[1, 0] = torch.nan
    output, expected = torch.empty(3, 512, dtype=dtype), torch.empty(3, 512, dtype=dtype)
    native.decode_fp4(packed, scale, output, group_size)
    values = decode_e2m1_pairs(packed).flatten(-2)
    expected = (values * mx.expand_groups(scale, group_size, 512)).to(dtype)
    assert same(output, expected)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poisoned_rows_and_only_they_are_not_finite(poison: float, kind: str, path: str) -> None:
    x = torch.randn(4, 64)
    x[2, 5] = poison
    result = Layer(kind, 8, 64).linear(x)
    assert not result[2].isfinite().any()
    assert result[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("kind", FORMATS)
def test_leading_dimensions_and_strides(kind: str, path: str) -> None:
    layer = Layer(kind, 8, 64)
    x = torch.randn(64, 3, 2).permute(2, 1, 0)
    torch.testing.assert_close(layer.linear(x), torch.nn.functional.linear(x, layer.weight()))


@pytest.mark.parametrize("kind", ["dualscale", "nvfp4"])
def test_compiles(kind: str, path: str) -> None:
    layer = Layer(kind, 40, 64)
    torch.compiler.reset()
    x = torch.randn(5, 64).bfloat16()
    torch.testing.assert_close(torch.compile(layer.linear, fullgraph=True)(x), layer.linear(x))


def test_operators_are_well_formed() -> None:
    x, bias = torch.randn(5, 64), torch.randn(8)
    packed, scale, dual_scale = Layer("dualscale", 8, 64).tensors
    torch.library.opcheck(mx_weight_only.product_operator, (x, packed, scale, bias, dual_scale))
    packed, scale, global_scale = Layer("nvfp4", 8, 64).tensors
    checks = ("test_autograd_registration", "test_faketensor")  # torch can't compare e4m3 for the others
    arguments = (x, packed, scale, bias, global_scale)
    torch.library.opcheck(nvfp4_weight_only.product_operator, arguments, test_utils=checks)


@pytest.mark.parametrize("module", [cpu_mx, cpu_nvfp4])
def test_other_dtypes_are_refused(module: object) -> None:
    assert "float64" in (module.can_run(Problem(torch.device("cpu"), torch.float64, 8, 8)) or "")  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [640, 1056])
@pytest.mark.parametrize("kind", FORMATS)
def test_nothing_is_read_beyond_a_weight(kind: str, columns: int, dtype: torch.dtype, wide_isa: str) -> None:
    layer = Layer(kind, 7, columns)
    inputs = [torch.randn(rows, columns).to(dtype) for rows in (1, 3, 7, 9, 70)]
    expected = [layer.linear(x) for x in inputs]
    layer.tensors = tuple(at_the_end_of_memory(tensor) for tensor in layer.tensors)
    for x, result in zip(inputs, expected, strict=True):
        assert same(layer.linear(x), result)
