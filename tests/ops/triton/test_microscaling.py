"""MX and NVFP4 kernels against the references."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from lowbit.ops import mx as mx_reference
from lowbit.ops import nvfp4 as nvfp4_reference
from lowbit.ops.dispatch import Problem
from lowbit.ops.triton import launch, mx, mx_weight_only, nvfp4, nvfp4_weight_only
from tests.support.fp8 import adversarial, every_rounding, random

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(9, 64), (9, 582)]


def awkward(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    x = adversarial(rows, columns, dtype)
    if dtype == torch.bfloat16 and device.type == "cpu":
        x[5] = x[8]  # the interpreter converts subnormal bfloat16 wrongly
    return x


def assert_same_bytes(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    left, right = actual.cpu().float(), expected.float()
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(left.signbit() & ~left.isnan(), right.signbit() & ~right.isnan())


@pytest.mark.parametrize(("dtype", "rounding"), [*zip(DTYPES, mx_reference.ROUNDINGS, strict=True)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mx_quantization_is_the_references_bit_for_bit(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int], rounding: str
) -> None:
    x = awkward(*shape, dtype, device)
    for kernel, reference in (
        (mx.quantize_mxfp8, mx_reference.quantize_mxfp8),
        (mx.quantize_mxfp4, mx_reference.quantize_mxfp4),
        (mx.quantize_mxfp4_dualscale, mx_reference.quantize_mxfp4_dualscale),
    ):
        for actual, expected in zip(kernel(x.to(device), rounding), reference(x, rounding), strict=True):
            assert_same_bytes(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nvfp4_quantization_is_the_references_bit_for_bit(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    x = awkward(*shape, dtype, device)
    found: Any = nvfp4.quantize_nvfp4_per_token(x.to(device))
    for actual, expected in zip(found, nvfp4_reference.quantize_nvfp4_per_token(x), strict=True):
        assert_same_bytes(actual, expected)
    scale = torch.tensor(0.003)
    found = nvfp4.quantize_nvfp4(x.to(device), scale.to(device))
    for actual, expected in zip(found, nvfp4_reference.quantize_nvfp4(x, scale), strict=True):
        assert_same_bytes(actual, expected)


def test_every_rounding_of_elements(device: torch.device) -> None:
    values = every_rounding()
    e2m1 = torch.tensor([0.0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6])
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    e2m1 = torch.cat([e2m1, e2m1.nextafter(up), e2m1.nextafter(down), -e2m1, torch.tensor([1e-40, 1e-45])])
    for largest, given, kernel, reference in (
        (448.0, values[values.isfinite() & (values.abs() <= 448)], mx.quantize_mxfp8, mx_reference.quantize_mxfp8),
        (6.0, e2m1, mx.quantize_mxfp4, mx_reference.quantize_mxfp4),
    ):
        filled = torch.nn.functional.pad(given, (0, -len(given) % 31)).reshape(-1, 31)
        rows = torch.nn.functional.pad(filled, (0, 1), value=largest)  # so that the scale is one
        for actual, expected in zip(kernel(rows.to(device), "ceil"), reference(rows, "ceil"), strict=True):
            assert_same_bytes(actual, expected)


FORMATS = ["mxfp8", "mxfp4", "dualscale"]
QUANTIZERS = {
    "mxfp8": mx_reference.quantize_mxfp8,
    "mxfp4": mx_reference.quantize_mxfp4,
    "dualscale": mx_reference.quantize_mxfp4_dualscale,
}


def check(result: torch.Tensor, left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Compare with the product in float64, against the sum of the products' magnitudes."""
    extra = torch.zeros(()).double() if bias is None else bias.double()
    exact = left.double() @ right.double().t() + extra
    magnitude = left.double().abs() @ right.double().abs().t() + extra.abs()
    bound = (1e-6 if result.device.type == "cpu" else 2**-12) * magnitude
    if result.dtype != torch.float32:
        # The interpreter cuts bfloat16 off where chips round it: one unit in the last place rather than half.
        bound = bound + torch.finfo(result.dtype).eps * exact.abs()
    assert ((result.cpu().double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", [(1, 64, 16), (3, 582, 20)], ids=str)
@pytest.mark.parametrize("quantized", [True, False], ids=["both", "weight only"])
def test_mx_products(device: torch.device, kind: str, shape: tuple[int, int, int], quantized: bool) -> None:
    m, k, n = shape
    x, bias = random(m, k, 1).bfloat16(), random(1, n, 3)[0]
    packed, scale, *dual = QUANTIZERS[kind](random(n, k, 2))
    weight = mx_reference.dequantize_mx(packed, scale, *dual)
    if quantized:
        arguments = [*QUANTIZERS[kind](x)]
        left = mx_reference.dequantize_mx(*arguments)
    else:
        left = x
    on = [tensor.to(device) for tensor in (packed, scale)]
    for given in (None, bias):
        there = None if given is None else given.to(device)
        if quantized:
            x_packed, x_scale, *x_dual = [tensor.to(device) for tensor in arguments]
            duals = [x_dual[0], dual[0].to(device)] if dual else []
            result = mx.mx_scaled_mm(x_packed, x_scale, *on, there, torch.float32, *duals)
        else:
            result = mx_weight_only.mx_weight_only_mm(x.to(device), *on, there, *(tensor.to(device) for tensor in dual))
        check(result, left, weight, given)


@pytest.mark.parametrize("shape", [(1, 64, 16), (3, 582, 20)], ids=str)
@pytest.mark.parametrize("scheme", ["token", "tensor", "none"])
def test_nvfp4_products(device: torch.device, shape: tuple[int, int, int], scheme: str) -> None:
    m, k, n = shape
    x, bias, weight = random(m, k, 1).bfloat16(), random(1, n, 3)[0].to(device), random(n, k, 2)
    global_scale = nvfp4_reference.global_scale_of(weight.abs().amax())
    packed, scale = nvfp4_reference.quantize_nvfp4(weight, global_scale)
    right = nvfp4_reference.dequantize_nvfp4(packed, scale, global_scale)
    on = [tensor.to(device) for tensor in (packed, scale, global_scale)]
    if scheme == "none":
        result = nvfp4_weight_only.nvfp4_weight_only_mm(x.to(device), *on[:2], bias, on[2])
        check(result, x, right, bias.cpu())
        return
    given = nvfp4_reference.quantize_activation(x, torch.tensor(0.002) if scheme == "tensor" else None)
    result = nvfp4.nvfp4_scaled_mm(*(tensor.to(device) for tensor in given), *on, bias, torch.float32)
    check(result, nvfp4_reference.dequantize_nvfp4(*given), right, bias.cpu())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poisoned_rows_and_only_they_give_nan(device: torch.device, poison: float) -> None:
    x = random(4, 256, 1)
    x[2, 5] = poison
    packed, scale = mx_reference.quantize_mxfp4(random(8, 256, 2))
    given = mx.quantize_mxfp4(x.to(device), "even")
    result = mx.mx_scaled_mm(*given, packed.to(device), scale.to(device), None, torch.float32)
    assert result[2].isnan().all()
    assert result[[0, 1, 3]].isfinite().all()


def test_chips_that_multiply_groups_are_told_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "device_refusal", lambda *_: None)
    monkeypatch.setattr(nvfp4, "device_refusal", lambda *_: None)
    problem = Problem(torch.device("cuda"), torch.bfloat16, 64, 64)
    verdicts = {}
    chips = [("cuda", 90), ("cuda", 100), ("hip", "gfx950"), ("hip", "gfx942")]
    for backend, arch in chips:
        target = launch.Target(backend, arch)
        monkeypatch.setattr(mx, "target_of", mock.Mock(return_value=target))
        monkeypatch.setattr(nvfp4, "target_of", mock.Mock(return_value=target))
        verdicts[arch] = (mx.can_run(problem) is None, nvfp4.can_run(problem) is None)
    assert verdicts == {90: (False, False), 100: (True, True), "gfx950": (True, False), "gfx942": (False, False)}
