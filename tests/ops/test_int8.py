"""The int8 reference against integer and float64 arithmetic in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowbit.ops import int8
from tests.support import calls

CASES = ["ordinary", "outlier", "zero_rows", "tiny", "huge", "constant"]


def quantize_in_numpy(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    values = x.float().numpy().astype(np.float64)
    scale = np.maximum(np.abs(values).max(axis=-1, keepdims=True), 1e-30) / 127
    return np.clip(np.rint(values / scale), -127, 127), scale


@pytest.mark.parametrize("case", CASES)
def test_quantization_agrees_with_float64(case: str, adversarial: dict[str, torch.Tensor]) -> None:
    quantized, scale = int8.quantize_int8_per_token(adversarial[case])
    expected, expected_scale = quantize_in_numpy(adversarial[case])
    assert quantized.dtype == torch.int8
    assert scale.dtype == torch.float32
    np.testing.assert_allclose(scale.numpy(), expected_scale, rtol=2**-23)
    # float32 division may fall on the other side of a tie
    assert np.abs(quantized.numpy() - expected).max() <= 1
    assert (quantized.numpy() != expected).mean() < 0.01


@pytest.mark.parametrize("case", CASES)
def test_error_is_at_most_half_a_step(case: str, adversarial: dict[str, torch.Tensor]) -> None:
    x = adversarial[case].double()
    quantized, scale = int8.quantize_int8_per_token(adversarial[case])
    assert ((quantized.double() * scale.double() - x).abs() <= 0.5001 * scale.double()).all()


def test_rounds_half_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    quantized, _ = int8.quantize_int8_per_token(x)
    assert quantized.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_every_code_decodes_as_float64_rounds_it() -> None:
    weight = torch.arange(-128, 128, dtype=torch.int8).repeat(40, 1)
    scale = torch.logspace(-30, 30, 40)[:, None]
    exact = weight.double() * scale.double()
    assert torch.equal(int8.dequantize_int8(weight, scale), exact.float())
    assert torch.equal(int8.dequantize_int8(weight, scale[3, 0]), (weight.double() * scale[3].double()).float())


def test_product_is_exact_in_integers() -> None:
    x = torch.full((3, 20_000), 127, dtype=torch.int8)  # the sum passes 2**24, where float32 stops counting
    weight = torch.full((5, 20_000), 127, dtype=torch.int8)
    weight[:, 0] = 126
    one = torch.ones(3, 1), torch.ones(5, 1)
    result = int8.int8_scaled_mm(x, one[0], weight, one[1], None, torch.float32)
    assert result[0, 0].item() == float(np.float32(127 * 127 * 20_000 - 127))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 7])
def test_linear_agrees_with_float64(dtype: torch.dtype, rows: int) -> None:
    x, weight, bias = torch.randn(rows, 300).to(dtype), torch.randn(70, 300), torch.randn(70)
    quantized, scale = int8.quantize_int8_per_token(weight)
    x_quantized, x_scale = int8.quantize_int8_per_token(x)
    exact = (x_quantized.double() * x_scale.double()) @ (quantized.double() * scale.double()).t() + bias.double()
    result = calls.linear(int8, x, quantized, scale, bias)
    assert result.dtype == dtype
    bound = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-21}[dtype]
    assert ((result.double() - exact).abs() <= bound * exact.abs() + 1e-6 * exact.abs().max()).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_poisoned_rows_and_only_they_give_nan(poison: float) -> None:
    x = torch.randn(4, 64)
    x[2, 5] = poison
    result = calls.linear(int8, x, *int8.quantize_int8_per_token(torch.randn(8, 64)), None)
    assert result[2].isnan().all()
    assert result[[0, 1, 3]].isfinite().all()


def test_leading_dimensions_and_strides() -> None:
    weight, scale = int8.quantize_int8_per_token(torch.randn(8, 64))
    x = torch.randn(64, 3, 2).permute(2, 1, 0)
    assert not x.is_contiguous()
    assert torch.equal(
        calls.linear(int8, x, weight, scale, None), calls.linear(int8, x.contiguous(), weight, scale, None)
    )
    assert calls.linear(int8, x[:, :0], weight, scale, None).shape == (2, 0, 8)


def test_operators_pass_opcheck() -> None:
    x = torch.randn(4, 64)
    torch.library.opcheck(int8.quantize_operator, (x,))
    quantized, scale = int8.quantize_int8_per_token(x)
    torch.library.opcheck(int8.scaled_mm_operator, (quantized, scale, quantized, scale, None, torch.bfloat16))
    torch.library.opcheck(int8.scaled_mm_operator, (quantized, scale, quantized, scale, torch.ones(4), torch.float32))


def test_compiling_traces_the_quantization_as_plain_operations() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    x = torch.randn(4, 64)
    compiled = torch.compile(lambda x: int8.quantize_activation(torch.nn.functional.silu(x)), backend=backend)
    result = compiled(x)
    expected = int8.quantize_int8_per_token(torch.nn.functional.silu(x))
    assert all(torch.equal(found, wanted) for found, wanted in zip(result, expected, strict=True))
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert len(graphs) == 1
    assert not any("lowbit" in target for target in targets)
