"""Int8 products with static activations against float64."""

from __future__ import annotations

import pytest
import torch

from lowbit.ops import int8_static
from lowbit.ops.cpu import int8_static as cpu_int8_static
from lowbit.ops.cpu.int8_native import can_run
from lowbit.ops.dispatch import Problem
from tests.support import calls

NATIVE = can_run(Problem(torch.device("cpu"), torch.float32, 64, 96))
MODULES = [
    int8_static,
    pytest.param(cpu_int8_static, marks=pytest.mark.skipif(NATIVE is not None, reason=str(NATIVE))),
]


def layer(offset: float, columns: int = 96, rows: int = 64) -> dict[str, torch.Tensor]:
    return {
        "packed": torch.randint(-128, 128, (rows, columns), dtype=torch.int8),
        "input_scale": torch.tensor(0.03),
        "input_offset": torch.tensor(offset),
        "quant_bias": torch.randint(-40000, 40000, (rows,), dtype=torch.int32),
        "deq_scale": torch.rand(rows) * 1e-4 + 1e-6,
    }


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("offset", [0.0, -17.0, 127.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_is_the_formula(module: object, offset: float, dtype: torch.dtype) -> None:
    tensors = layer(offset)
    x = (torch.randn(2, 5, 96) * 2).to(dtype)
    x[0, 0] = 0
    x[0, 1, 3] = 1000.0
    wide = x.double().reshape(10, 96)
    # x / s is a float32 quotient by definition; all else is exact.
    quotient = (x.float().reshape(10, 96) / tensors["input_scale"]).double()
    q = (quotient.round() + offset).clamp(-128, 127)
    sums = q @ tensors["packed"].double().t()
    expected = (sums + tensors["quant_bias"].double()) * tensors["deq_scale"].double()
    result = calls.linear(module, x, *tensors.values())
    assert result.dtype == dtype
    assert result.shape == (2, 5, 64)
    size = (sums.abs() + tensors["quant_bias"].double().abs()) * tensors["deq_scale"].double()
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-24
    assert ((result.double().reshape(10, 64) - expected).abs() <= 2e-7 * size + rounding * expected.abs()).all()
    assert wide.shape == (10, 96)


@pytest.mark.parametrize("module", MODULES)
def test_nan_makes_its_row_nan_and_infinity_saturates(module: object) -> None:
    tensors = layer(3.0)
    x = torch.randn(3, 96)
    x[1, 5], x[2, 5] = torch.nan, torch.inf
    result = calls.linear(module, x, *tensors.values())
    assert result[1].isnan().all()
    assert result[[0, 2]].isfinite().all()


def test_the_decoder_against_float64() -> None:
    weight = torch.arange(-128, 128, dtype=torch.int8).repeat(9, 1)
    deq_scale, input_scale = torch.rand(9) * 1e-4, torch.tensor([0.02])
    exact = weight.double() * deq_scale.double()[:, None] / input_scale.double()
    found = int8_static.dequantize_int8_static(weight, deq_scale, input_scale)
    torch.testing.assert_close(found.double(), exact, rtol=2e-7, atol=0)


def test_scales_as_bits_and_bias() -> None:
    tensors = layer(-9.0)
    bits = tensors["deq_scale"].view(torch.int32).long()
    assert torch.equal(int8_static.bits_to_scale(bits), tensors["deq_scale"])
    bias = torch.randn(64)
    weight, scale = tensors["packed"].double(), tensors["deq_scale"].double()
    quant_bias = (bias.double() / scale - weight.sum(1) * -9.0).round().to(torch.int32)
    found = int8_static.bias_of(tensors["packed"], tensors["input_offset"], quant_bias, tensors["deq_scale"])
    assert ((found.double() - bias.double()).abs() <= 0.5001 * scale + 1e-6).all()
