"""The NVFP4 reference against float64 arithmetic and diffusers' reader of the layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowbit.ops import nvfp4, nvfp4_weight_only
from lowbit.ops.e2m1 import decode_e2m1, unpack_nibbles
from tests.support import calls

CASES = ["ordinary", "outlier", "zero_rows", "tiny", "huge", "constant"]


def exact_values(packed: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor) -> np.ndarray:
    codes = decode_e2m1(unpack_nibbles(packed)).double().numpy()
    scales = (scale.float() * global_scale).double().numpy()
    return codes * np.repeat(scales, 16, axis=-1)[..., : codes.shape[-1]]


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_errors_stay_within_half_a_unit(case: str, search: bool, adversarial: dict[str, torch.Tensor]) -> None:
    x = adversarial[case].float()
    global_scale = nvfp4.global_scale_of(x.abs().amax())
    packed, scale = nvfp4.quantize_nvfp4(x, global_scale, search)
    assert (packed.shape, scale.shape) == ((6, 150), (6, 19))
    step = np.repeat((scale.float() * global_scale).double().numpy(), 16, axis=1)[:, :300]
    exact = x.double().numpy()
    error = np.abs(exact_values(packed, scale, global_scale) - exact)
    over = np.maximum(np.abs(exact) - 6 * step, 0)
    bound = np.maximum(np.maximum(np.abs(exact) / 4, step / 4), over)
    assert (error <= bound * (1 + 1e-5)).all()


def test_dequantization_is_exact() -> None:
    packed = torch.arange(256, dtype=torch.uint8).repeat(127, 1)
    scale = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(127, 1).repeat(1, 32)
    global_scale = torch.tensor(0.37)
    result = nvfp4.dequantize_nvfp4(packed, scale, global_scale)
    np.testing.assert_allclose(result.numpy(), exact_values(packed, scale, global_scale), rtol=1e-7)


def test_diffusers_reads_and_writes_the_same() -> None:
    utils = pytest.importorskip("diffusers.quantizers.bfl.utils")
    weight = torch.randn(70, 320) * torch.randn(70, 1).exp()
    theirs, their_scale, global_scale = utils.quantize_nvfp4(weight)
    packed, scale = nvfp4.quantize_nvfp4(weight, global_scale)
    assert torch.equal(packed, theirs)
    assert torch.equal(scale.view(torch.uint8), their_scale.view(torch.uint8))
    ours = nvfp4.dequantize_nvfp4(packed, scale, global_scale)
    assert torch.equal(ours, utils.dequantize_nvfp4(theirs, their_scale, global_scale))


def test_agrees_with_torchao() -> None:
    torchao = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    # Powers of two: torchao multiplies by a reciprocal where the formula divides.
    weight = torch.randn(64, 256).clamp(-4, 4)
    global_scale = torch.tensor(2.0**-9)
    packed, scale = nvfp4.quantize_nvfp4(weight, global_scale)
    their_scale, theirs = torchao.nvfp4_quantize(weight, per_tensor_scale=global_scale)
    assert torch.equal(scale.view(torch.uint8), their_scale.view(torch.uint8))
    restored = nvfp4.dequantize_nvfp4(packed, scale, global_scale)
    other = nvfp4.dequantize_nvfp4(theirs, their_scale, global_scale)
    assert (restored != other).float().mean() < 1e-3  # ties that the reciprocal moves


def test_search_never_raises_a_groups_error() -> None:
    weight = torch.randn(64, 256) * torch.randn(64, 1).exp()
    global_scale = nvfp4.global_scale_of(weight.abs().amax(), nvfp4.SEARCHED_SCALE_MAX)

    def errors(search: bool) -> torch.Tensor:
        restored = nvfp4.dequantize_nvfp4(*nvfp4.quantize_nvfp4(weight, global_scale, search), global_scale)
        return (restored - weight).square().unflatten(-1, (-1, 16)).sum(-1)

    plain, searched = errors(False), errors(True)
    assert (searched <= plain * (1 + 1e-6)).all()
    assert searched.sum() < 0.8 * plain.sum()


@pytest.mark.parametrize("scheme", ["token", "tensor", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 9])
def test_linear_agrees_with_float64(scheme: str, dtype: torch.dtype, rows: int) -> None:
    x, weight, bias = torch.randn(rows, 304).to(dtype), torch.randn(70, 304), torch.randn(70)
    global_scale = nvfp4.global_scale_of(weight.abs().amax())
    packed, scale = nvfp4.quantize_nvfp4(weight, global_scale)
    input_scale = torch.tensor(0.0015) if scheme == "tensor" else None
    left = x.double().numpy() if scheme == "none" else exact_values(*nvfp4.quantize_activation(x, input_scale))
    exact = left @ exact_values(packed, scale, global_scale).T + bias.double().numpy()
    result = calls.linear(nvfp4, x, packed, scale, bias, global_scale, input_scale, scheme == "none")
    assert result.dtype == dtype
    bound = {torch.bfloat16: 2**-8, torch.float32: 2**-21}[dtype]
    assert (np.abs(result.double().numpy() - exact) <= bound * np.abs(exact) + 2e-6 * np.abs(exact).max()).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", ["token", "tensor", "none"])
def test_poisoned_rows_and_only_they_are_not_finite(poison: float, scheme: str) -> None:
    x = torch.randn(4, 256)
    x[2, 5] = poison
    global_scale = torch.tensor(0.001)
    packed, scale = nvfp4.quantize_nvfp4(torch.randn(8, 256), global_scale)
    input_scale = torch.tensor(0.001) if scheme == "tensor" else None
    result = calls.linear(nvfp4, x, packed, scale, None, global_scale, input_scale, scheme == "none")
    assert not result[2].isfinite().any()
    assert result[[0, 1, 3]].isfinite().all()


def test_weight_only_leaves_activations_alone() -> None:
    x, weight, bias = torch.randn(2, 3, 320), torch.randn(70, 320), torch.randn(70)
    global_scale = nvfp4.global_scale_of(weight.abs().amax())
    packed, scale = nvfp4.quantize_nvfp4(weight, global_scale)
    exact = x.double().numpy() @ exact_values(packed, scale, global_scale).T + bias.double().numpy()
    result = calls.linear(nvfp4_weight_only, x, packed, scale, bias, global_scale)
    np.testing.assert_allclose(result.double().numpy(), exact, rtol=1e-4, atol=1e-4)


WITHOUT_ARITHMETIC = ("test_autograd_registration", "test_faketensor")


def test_operators_pass_opcheck() -> None:
    x, global_scale = torch.randn(4, 256), torch.tensor(0.001)
    torch.library.opcheck(nvfp4.quantize_operator, (x, global_scale, True), test_utils=WITHOUT_ARITHMETIC)
    torch.library.opcheck(nvfp4.quantize_per_token_operator, (x,), test_utils=WITHOUT_ARITHMETIC)
    packed, scale, x_global = nvfp4.quantize_nvfp4_per_token(x)
    arguments = (packed, scale, x_global, packed, scale, global_scale, None, torch.bfloat16)
    torch.library.opcheck(nvfp4.scaled_mm_operator, arguments, test_utils=WITHOUT_ARITHMETIC)
