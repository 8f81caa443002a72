"""The FP8 reference against ml_dtypes' conversions and float64 arithmetic."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from lowbit.ops import fp8, fp8_weight_only
from tests.support import calls

CASES = ["ordinary", "outlier", "zero_rows", "tiny", "huge", "constant"]


def as_numpy(values: torch.Tensor) -> np.ndarray:
    return values.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)


def test_every_code_means_what_ml_dtypes_says() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    ours = fp8.dequantize_fp8(codes.view(fp8.E4M3).reshape(16, 16), torch.tensor(1.0))
    theirs = codes.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32).reshape(16, 16)
    np.testing.assert_array_equal(ours.numpy(), theirs)


def test_conversion_rounds_as_ml_dtypes_and_saturates() -> None:
    codes = np.arange(0, 0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ties = (codes[:-1] + codes[1:]) / 2
    values = np.concatenate([codes, ties, np.nextafter(ties, 0), np.nextafter(ties, 1000), np.linspace(0, 448, 5001)])
    values = np.concatenate([values, -values]).astype(np.float32)
    ours = as_numpy(fp8.to_e4m3(torch.from_numpy(values)))
    np.testing.assert_array_equal(ours, values.astype(ml_dtypes.float8_e4m3fn).astype(np.float64))
    beyond = fp8.to_e4m3(torch.tensor([460.0, 1e30, -1e30])).float()
    assert beyond.tolist() == [448.0, 448.0, -448.0]
    assert fp8.to_e4m3(torch.tensor([float("inf"), -float("inf"), float("nan")])).float().isnan().all()


@pytest.mark.parametrize("case", CASES)
def test_quantization_keeps_three_bits(case: str, adversarial: dict[str, torch.Tensor]) -> None:
    x = adversarial[case]
    quantized, scale = fp8.quantize_fp8_per_token(x)
    restored = as_numpy(quantized) * scale.double().numpy()
    exact = x.double().numpy()
    # half a unit of 3 bits of mantissa; below the smallest normal number 2**-6, half a step of 2**-9
    bound = np.maximum(np.abs(exact) * 2.0**-4, 2.0**-10 * scale.double().numpy()) * 1.001
    assert (np.abs(restored - exact) <= bound).all()


@pytest.mark.parametrize("columns", [100, 128, 300])
def test_groups_are_quantized_by_themselves(columns: int) -> None:
    x = torch.randn(5, columns) * torch.logspace(-3, 3, columns)
    quantized, scale = fp8.quantize_fp8_per_group(x, 128)
    assert scale.shape == (5, -(-columns // 128))
    for index, group in enumerate(x.split(128, dim=1)):
        expected, expected_scale = fp8.quantize_fp8_per_token(group)
        part = quantized[:, index * 128 : index * 128 + group.shape[1]]
        assert torch.equal(part.view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(scale[:, index : index + 1], expected_scale)


@pytest.mark.parametrize("shape", [(128, 128), (130, 257), (5, 7)])
def test_blocks_have_the_scale_of_their_absmax(shape: tuple[int, int]) -> None:
    weight = torch.randn(*shape)
    quantized, scale = fp8.quantize_fp8_per_block(weight, (128, 128))
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            block = weight[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128]
            assert scale[row, column].item() == pytest.approx(block.abs().max().item() / 448)
    error = fp8.dequantize_fp8(quantized, scale, (128, 128)) - weight
    assert error.abs().max() <= weight.abs().max() * 2**-4


@pytest.mark.parametrize("scheme", ["token", "group", "tensor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_agrees_with_float64(scheme: str, dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(9, 300).to(dtype), torch.randn(70, 300), torch.randn(70)
    block = (128, 128) if scheme == "group" else None
    input_scale = torch.tensor(0.02) if scheme == "tensor" else None
    quantized, scale = (
        fp8.quantize_fp8_per_block(weight, block) if block is not None else fp8.quantize_fp8_per_token(weight)
    )
    x_quantized, x_scale = fp8.quantize_activation(x, input_scale, block)
    left = as_numpy(x_quantized) * fp8.expand_scale(x_scale, x.shape, block and (1, 128)).double().numpy()
    right = as_numpy(quantized) * fp8.expand_scale(scale, weight.shape, block).double().numpy()
    exact = left @ right.T + bias.double().numpy()
    result = calls.linear(fp8, x, quantized, scale, bias, input_scale, block)
    bound = {torch.bfloat16: 2**-8, torch.float32: 2**-21}[dtype]
    assert (np.abs(result.double().numpy() - exact) <= bound * np.abs(exact) + 2e-6 * np.abs(exact).max()).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scheme", ["token", "group", "tensor"])
def test_poisoned_rows_and_only_they_give_nan(poison: float, scheme: str) -> None:
    x = torch.randn(4, 256)
    x[2, 5] = poison
    block = (128, 128) if scheme == "group" else None
    weight = torch.randn(8, 256)
    tensors = fp8.quantize_fp8_per_block(weight, block) if block else fp8.quantize_fp8_per_token(weight)
    result = calls.linear(fp8, x, *tensors, None, torch.tensor(0.02) if scheme == "tensor" else None, block)
    assert result[2].isnan().all()
    assert result[[0, 1, 3]].isfinite().all()


def test_weight_only_leaves_activations_alone() -> None:
    x, weight, bias = torch.randn(2, 3, 300), torch.randn(70, 300), torch.randn(70)
    quantized, scale = fp8.quantize_fp8_per_token(weight)
    restored = as_numpy(quantized) * scale.double().numpy()
    exact = x.double().numpy() @ restored.T + bias.double().numpy()
    result = calls.linear(fp8_weight_only, x, quantized, scale, bias)
    np.testing.assert_allclose(result.double().numpy(), exact, rtol=1e-4, atol=1e-4)


# opcheck compares results with arithmetic that torch does not have for float8; what returns float8 takes the others.
WITHOUT_ARITHMETIC = ("test_autograd_registration", "test_faketensor")


def test_operators_pass_opcheck() -> None:
    x = torch.randn(4, 256)
    torch.library.opcheck(fp8.quantize_per_group_operator, (x, 128), test_utils=WITHOUT_ARITHMETIC)
    torch.library.opcheck(fp8.quantize_per_token_operator, (x,), test_utils=WITHOUT_ARITHMETIC)
    torch.library.opcheck(fp8.quantize_per_tensor_operator, (x, torch.tensor(0.1)), test_utils=WITHOUT_ARITHMETIC)
    quantized, scale = fp8.quantize_fp8_per_token(x)
    arguments = (quantized, scale, quantized, scale, None, torch.bfloat16)
    torch.library.opcheck(fp8.scaled_mm_operator, arguments, test_utils=WITHOUT_ARITHMETIC)
