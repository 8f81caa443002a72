from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from lowbit.ops.int8 import quantize_activation
from lowbit.ops.weight_format import Prepared
from tests.support import calls

pytest.importorskip("triton")

from lowbit.errors import UnsupportedError
from lowbit.ops import int8 as reference
from lowbit.ops.dispatch import Problem
from lowbit.ops.triton import int8, launch, quantize_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def adversarial(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of every kind: zero, an outlier, NaN, infinity, tiny, subnormal, large, constant; the rest random."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))
    x[0] = 0
    x[1, 5] = 3000
    x[2, 3] = torch.nan
    x[3, 7] = -torch.inf
    x[4] *= 1e-20
    x[5] *= 1e-40
    x[6] *= torch.finfo(dtype).max / 8
    x[7] = -1.5
    return x.to(dtype)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=0, atol=0, equal_nan=True)


def int8_matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)


def scales(rows: int, seed: int) -> torch.Tensor:
    return torch.rand(rows, 1, generator=torch.Generator().manual_seed(seed)) + 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantization_is_the_references_bit_for_bit(device: torch.device, dtype: torch.dtype) -> None:
    x = adversarial(10, 301, dtype)
    quantized, scale = int8.quantize_int8_per_token(x.to(device))
    expected, expected_scale = reference.quantize_int8_per_token(x)
    assert torch.equal(quantized.cpu(), expected)
    assert_same(scale, expected_scale)


def test_quantization_rounds_half_to_even(device: torch.device) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 125.5, 126.5, -126.5]], device=device)
    quantized, scale = int8.quantize_int8_per_token(x)
    assert scale.item() == 1.0
    assert quantized.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, 126, -126]]


def test_quantization_is_within_half_a_step_of_float64(device: torch.device) -> None:
    x = torch.randn(3, 333, generator=torch.Generator().manual_seed(0))
    quantized, scale = int8.quantize_int8_per_token(x.to(device))
    exact = x.double() / (x.double().abs().amax(dim=-1, keepdim=True) / 127)
    assert (quantized.cpu().double() - exact).abs().max() <= 0.5 + 127 * 2**-22
    assert (quantized.abs().amax(dim=-1) == 127).all()
    assert scale.shape == (3, 1)


@pytest.mark.parametrize("columns", [1000, 1024, 1025])
def test_rows_longer_than_a_block(device: torch.device, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_rows, "LONGEST_BLOCK", 256)
    x = adversarial(8, columns, torch.float32)
    x[7, -1] = 50  # The maximum is in the last block, the only one that is ragged.
    quantized, scale = int8.quantize_int8_per_token(x.to(device))
    expected, expected_scale = reference.quantize_int8_per_token(x)
    assert torch.equal(quantized.cpu(), expected)
    assert_same(scale, expected_scale)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.reshape(2, 6, 40)[:, 1:4],
        lambda x: x[:, ::3],
        lambda x: x.t(),
        lambda x: x[:, 7:8],
        lambda x: x[0],
        lambda x: x[:0],
    ],
    ids=["rows of a batch", "columns apart", "transposed", "one column", "one row", "no rows"],
)
def test_quantization_of_views(device: torch.device, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = view(torch.randn(12, 40, generator=torch.Generator().manual_seed(1)))
    moved = view(torch.randn(12, 40, generator=torch.Generator().manual_seed(1)).to(device))
    quantized, scale = int8.quantize_int8_per_token(moved)
    expected = reference.quantize_int8_per_token(x)
    assert quantized.is_contiguous()
    assert torch.equal(quantized.cpu(), expected[0])
    assert torch.equal(scale.cpu(), expected[1])


@pytest.mark.parametrize(
    ("m", "k", "n"),
    [(1, 64, 32), (1, 200, 51), (37, 200, 51), (70, 32, 33), (33, 17, 1), (32, 128, 64)],
)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_product_is_the_references_bit_for_bit(device: torch.device, m: int, k: int, n: int, has_bias: bool) -> None:
    x, weight = int8_matrix(m, k, 1), int8_matrix(n, k, 2)
    bias = torch.randn(n, generator=torch.Generator().manual_seed(3)) if has_bias else None
    arguments = (x, scales(m, 4), weight, scales(n, 5), bias)
    actual = int8.int8_scaled_mm(*(None if a is None else a.to(device) for a in arguments), torch.float32)
    assert_same(actual, reference.int8_scaled_mm(*arguments, torch.float32))

    exact = (x.double() @ weight.double().t()) * arguments[1].double() * arguments[3].double().t()
    exact = exact if bias is None else exact + bias.double()
    largest = exact.abs().max()
    assert (actual.cpu().double() - exact).abs().max() <= 4e-7 * largest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_product_in_half_precision(device: torch.device, dtype: torch.dtype) -> None:
    arguments = (int8_matrix(5, 96, 1), scales(5, 2) * 1e-3, int8_matrix(40, 96, 3), scales(40, 4))
    bias = torch.randn(40, generator=torch.Generator().manual_seed(5)).to(dtype)
    actual = int8.int8_scaled_mm(*(a.to(device) for a in arguments), bias.to(device), dtype)
    expected = reference.int8_scaled_mm(*arguments, bias, torch.float32)
    assert actual.dtype == dtype
    # The interpreter cuts bfloat16 off where chips round it: one unit in the last place rather than half.
    torch.testing.assert_close(actual.cpu().float(), expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_product_of_extremes_is_exact(device: torch.device) -> None:
    x, weight = torch.full((2, 4096), -128, dtype=torch.int8), torch.full((3, 4096), -128, dtype=torch.int8)
    ones = torch.ones(3, 1)
    moved = [a.to(device) for a in (x, ones[:2], weight, ones)]
    assert (int8.int8_scaled_mm(*moved, None, torch.float32) == 4096 * 128 * 128).all()


@pytest.mark.parametrize(
    ("view_x", "view_weight"),
    [
        (lambda x: x[::2, 5:], lambda w: w[::3, 5:]),
        (lambda x: x.t().contiguous().t(), lambda w: w.t().contiguous().t()),
    ],
    ids=["rows apart", "columns first"],
)
def test_product_of_views(
    device: torch.device,
    view_x: Callable[[torch.Tensor], torch.Tensor],
    view_weight: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    x, weight = view_x(int8_matrix(40, 70, 1)), view_weight(int8_matrix(60, 70, 2))
    x_moved, weight_moved = view_x(int8_matrix(40, 70, 1).to(device)), view_weight(int8_matrix(60, 70, 2).to(device))
    x_scale, weight_scale = scales(x.shape[0], 3), scales(weight.shape[0], 4)
    actual = int8.int8_scaled_mm(
        x_moved, x_scale.to(device), weight_moved, weight_scale.to(device), None, torch.float32
    )
    assert_same(actual, reference.int8_scaled_mm(x, x_scale, weight, weight_scale, None, torch.float32))


def test_a_scale_that_is_not_finite_reaches_its_row_only(device: torch.device) -> None:
    x_scale = torch.tensor([[1.0], [torch.nan], [torch.inf]])
    x = torch.zeros(3, 32, dtype=torch.int8)
    arguments = [a.to(device) for a in (x, x_scale, int8_matrix(4, 32, 1), torch.ones(4, 1))]
    result = int8.int8_scaled_mm(*arguments, None, torch.float32).cpu()
    assert (result[0] == 0).all()
    assert result[1:].isnan().all()


def test_empty_products(device: torch.device) -> None:
    def product(m: int, n: int) -> torch.Size:
        shapes = ((m, 32, torch.int8), (m, 1, torch.float32), (n, 32, torch.int8), (n, 1, torch.float32))
        arguments = [torch.empty(rows, columns, dtype=dtype, device=device) for rows, columns, dtype in shapes]
        return int8.int8_scaled_mm(*arguments, None, torch.bfloat16).shape

    assert product(0, 8) == (0, 8)
    assert product(8, 0) == (8, 0)


def test_linear_is_the_references(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu":  # The operators' kernels for the CPU are other ones.
        monkeypatch.setattr(int8, "quantize_activation", int8.quantize_int8_per_token)
        monkeypatch.setattr(int8, "scaled_mm_operator", int8.int8_scaled_mm)
    x = adversarial(12, 72, torch.float32).reshape(2, 6, 72)
    weight, weight_scale = reference.quantize_int8_per_token(torch.randn(9, 72))
    bias = torch.randn(9)
    packed = calls.packed(int8, weight).to(device)
    actual = calls.linear(int8, x.to(device), packed, weight_scale.to(device), bias.to(device)).cpu()
    assert_same(actual, calls.linear(reference, x, weight, weight_scale, bias))
    bad = ~x.isfinite().all(dim=-1)
    assert actual[bad].isnan().all()
    assert not actual[~bad].isnan().any()
    assert torch.equal(calls.unpacked(int8, packed).cpu(), weight)


def test_compiling_leaves_the_quantization_to_the_compiler() -> None:
    targets: list[str] = []

    def collect(graph: torch.fx.GraphModule, inputs: object) -> object:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    weight, weight_scale = reference.quantize_int8_per_token(torch.randn(8, 64))
    x = torch.randn(3, 64)
    compiled = torch.compile(calls.function(int8), backend=collect, fullgraph=True)
    assert_same(compiled(x, weight, weight_scale, None), calls.linear(reference, x, weight, weight_scale, None))
    assert any("int8_scaled_mm" in target for target in targets)
    assert not any("quantize_int8_per_token" in target for target in targets)


@pytest.mark.parametrize("name", ["quantize_int8_per_token", "int8_scaled_mm"])
@pytest.mark.parametrize("key", ["CUDA", "XPU"])
def test_operators_have_these_kernels(name: str, key: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lowbit::{name}", key)


def test_wrong_shapes_are_refused() -> None:
    x, weight, ones = int8_matrix(2, 32, 1), int8_matrix(3, 48, 2), torch.ones(3, 1)
    with pytest.raises(ValueError, match=r"weight .*\(3, 32\), not \(3, 48\)"):
        int8.int8_scaled_mm(x, ones[:2], weight, ones, None, torch.float32)
    with pytest.raises(ValueError, match=r"x_scale .*\(2, 1\), not \(3, 1\)"):
        int8.int8_scaled_mm(x, ones, weight[:, :32], ones, None, torch.float32)


def test_sums_that_could_leave_int32_are_refused() -> None:
    assert int8.LARGEST_K * 128 * 128 < 2**31 <= (int8.LARGEST_K + 1) * 128 * 128
    x, ones = torch.zeros(1, int8.LARGEST_K + 1, dtype=torch.int8), torch.ones(1, 1)
    with pytest.raises(UnsupportedError, match="int32"):
        int8.int8_scaled_mm(x, ones, x, ones, None, torch.float32)


def problem(**changes: object) -> Problem:
    defaults = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "out_features": 64, "in_features": 64}
    return Problem(**{**defaults, **changes})


@pytest.mark.parametrize(
    ("target", "asked", "reason"),
    [
        (launch.Target("cuda", 75), problem(), r"need SM 8\.0 \(this is SM 7\.5\)"),
        (launch.Target("cuda", 80), problem(in_features=2**18), "int32"),
        (launch.Target("cuda", 90), problem(dtype=torch.float64), "float64"),
        (launch.Target("cuda", 80), problem(), None),
        (launch.Target("hip", "gfx942"), problem(), None),
    ],
)
def test_supports(monkeypatch: pytest.MonkeyPatch, target: launch.Target, asked: Problem, reason: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(int8, "target_of", lambda device: target)
    verdict = int8.can_run(asked)
    assert (verdict is None) == (reason is None)
    assert reason is None or re.search(reason, str(verdict))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("m", [1, 48, 300])
@pytest.mark.parametrize("k", [1024, 1000])
def test_every_tile_of_this_chip(m: int, k: int) -> None:
    arguments = (int8_matrix(m, k, 1), scales(m, 2), int8_matrix(500, k, 3), scales(500, 4), torch.randn(500))
    actual = int8.int8_scaled_mm(*(a.cuda() for a in arguments), torch.float32)
    assert_same(actual, reference.int8_scaled_mm(*arguments, torch.float32))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_results_of_more_than_two_to_the_31_elements() -> None:
    m, n = 2**16 + 1, 2**15 + 1
    x, weight = int8_matrix(m, 32, 1).cuda(), int8_matrix(n, 32, 2).cuda()
    scale = torch.full((m, 1), 0.01, device="cuda")
    result = int8.int8_scaled_mm(x, scale, weight, scale[:n], None, torch.float16)
    last = int8.int8_scaled_mm(x[-3:], scale[:3], weight, scale[:n], None, torch.float16)
    assert torch.equal(result[-3:], last)
    assert last.isfinite().all()


def test_layers_with_one_input_quantize_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [reference.quantize_int8_per_token(torch.randn(features, 64)) for features in (16, 48)]
    bias = [None, torch.randn(48)]
    x = torch.randn(2, 5, 64).bfloat16()
    alone = [calls.linear(int8, x, *layer, b) for layer, b in zip(layers, bias, strict=True)]
    quantized: list[torch.Tensor] = []
    quantize = quantize_activation
    monkeypatch.setattr(int8, "quantize_activation", lambda given: quantize((quantized.append(given), given)[1]))
    together = int8.linears(x, [Prepared(*layer) for layer in layers], bias)
    assert len(quantized) == 1
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
