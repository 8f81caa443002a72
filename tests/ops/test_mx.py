"""The MX references against the specification, ml_dtypes and float64 arithmetic.

The bit-for-bit comparison with torchao's conversions is ``test_agrees_with_torchao``, which runs where torchao is.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from lowbit.ops import fp8, mx
from lowbit.ops.e2m1 import decode_e2m1, unpack_nibbles
from tests.support import calls

CASES = ["ordinary", "outlier", "zero_rows", "tiny", "huge", "constant"]
QUANTIZERS = {"mxfp8": mx.quantize_mxfp8, "mxfp4": mx.quantize_mxfp4}
# Half a unit of the mantissa, and half the step of the numbers below the smallest normal one.
PRECISIONS = {"mxfp8": (2.0**-4, 2.0**-10), "mxfp4": (2.0**-2, 2.0**-2)}


def elements(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == fp8.E4M3:
        return tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return decode_e2m1(unpack_nibbles(tensor)).double().numpy()


def powers(scale: torch.Tensor, columns: int) -> np.ndarray:
    """2 ** (code - 127) in float64, spread over the columns of their groups."""
    values = np.where(scale.numpy() == 255, np.nan, 2.0 ** (scale.numpy().astype(np.float64) - 127))
    return np.repeat(values, 32, axis=-1)[..., :columns]


def test_every_scale_code_means_what_the_specification_says() -> None:
    values = mx.decode_e8m0(torch.arange(256, dtype=torch.uint8))
    assert values[:255].tolist() == [2.0 ** (code - 127) for code in range(255)]
    assert values[255].isnan()
    theirs = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(values.numpy(), theirs)


@pytest.mark.parametrize("element", ["mxfp8", "mxfp4"])
def test_scales_of_powers_and_their_neighbours(element: str) -> None:
    exponents = torch.arange(-149, 128)
    absmax = torch.cat([2.0 ** exponents.double() * factor for factor in (1, 1.25, 1.5, 1.75, 1.8125, 1.9375)]).float()
    absmax = torch.cat([absmax, absmax.nextafter(torch.tensor(torch.inf)), absmax.nextafter(torch.tensor(0.0))])
    absmax = absmax[absmax.isfinite() & (absmax > 0)]
    kind = mx.ELEMENTS[element]
    floor = [math.floor(math.log2(value)) - kind.exponent for value in absmax.tolist()]
    expected = torch.tensor(floor).clamp(-127, 127) + 127
    assert torch.equal(mx.scale_codes(absmax, element, "floor").long(), expected)
    codes = mx.scale_codes(absmax, element, "ceil").long()
    fits = absmax.double() <= kind.largest * 2.0 ** (codes.double() - 127)
    tight = absmax.double() > kind.largest * 2.0 ** (codes.double() - 128)
    assert fits.all()
    assert (tight | (codes == 0)).all()


def test_scales_of_zero_and_of_what_is_not_finite() -> None:
    absmax = torch.tensor([0.0, torch.nan, torch.inf])
    for element in mx.ELEMENTS:
        for rounding in mx.ROUNDINGS:
            assert mx.scale_codes(absmax, element, rounding).tolist() == [0, 255, 255]


@pytest.mark.parametrize("rounding", [*mx.ROUNDINGS, "mse"])
@pytest.mark.parametrize("element", QUANTIZERS)
@pytest.mark.parametrize("case", CASES)
def test_errors_stay_within_half_a_unit(
    case: str, element: str, rounding: str, adversarial: dict[str, torch.Tensor]
) -> None:
    x = adversarial[case]
    packed, scale = QUANTIZERS[element](x, rounding)
    assert scale.shape == (6, 10)
    power = powers(scale, 300)
    exact = x.double().numpy()
    error = np.abs(elements(packed) * power - exact)
    relative, subnormal = PRECISIONS[element]
    largest = mx.ELEMENTS[element].largest
    clamped = np.abs(exact) > largest * power  # only "ceil" promises that there are none
    assert not (rounding == "ceil" and clamped.any())
    bound = np.where(clamped, np.abs(exact) - largest * power, np.maximum(np.abs(exact) * relative, subnormal * power))
    assert (error <= bound * (1 + 1e-6)).all()
    np.testing.assert_array_equal(mx.dequantize_mx(packed, scale).double().numpy(), elements(packed) * power)


@pytest.mark.parametrize("element", QUANTIZERS)
def test_searched_scales_have_the_least_error(element: str) -> None:
    x = torch.randn(40, 256) * torch.randn(40, 1).exp()
    quantize = QUANTIZERS[element]

    def errors(rounding: str) -> torch.Tensor:
        return (mx.dequantize_mx(*quantize(x, rounding)) - x).double().square().unflatten(-1, (-1, 32)).sum(-1)

    searched = errors("mse")
    for rounding in mx.ROUNDINGS:
        assert (searched <= errors(rounding) * (1 + 1e-6)).all()


def test_the_largest_of_512_is_exact_with_a_second_scale(adversarial: dict[str, torch.Tensor]) -> None:
    x = torch.cat([adversarial["ordinary"].float(), torch.randn(6, 724)], dim=1)
    packed, scale, dual_scale = mx.quantize_mxfp4_dualscale(x)
    assert (packed.shape, scale.shape, dual_scale.shape) == ((6, 512), (6, 32), (6, 2))
    restored = mx.dequantize_mx(packed, scale, dual_scale)
    dual = dual_scale.double().numpy().repeat(512, axis=1)
    np.testing.assert_allclose(restored.numpy(), elements(packed) * powers(scale, 1024) * dual, rtol=2e-7)
    for group in range(2):
        part = slice(512 * group, 512 * group + 512)
        place = x[:, part].abs().argmax(dim=1, keepdim=True)
        torch.testing.assert_close(restored[:, part].gather(1, place), x[:, part].gather(1, place), rtol=1e-6, atol=0)
    assert ((restored - x).norm() / x.norm()) < 0.12


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["mxfp8", "mxfp4", "dualscale"])
def test_poisoned_groups_and_only_they_are_nan(poison: float, kind: str) -> None:
    x = torch.randn(3, 1024)
    x[1, 40] = poison
    quantize = mx.quantize_mxfp4_dualscale if kind == "dualscale" else QUANTIZERS[kind]
    restored = mx.dequantize_mx(*quantize(x))
    assert restored[[0, 2]].isfinite().all()
    assert restored[1, 32:64].isnan().all()
    assert restored[1, 512:].isfinite().all()


FORMATS = ["mxfp8", "mxfp4", "dualscale"]


def quantized(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    if kind == "dualscale":
        return mx.quantize_mxfp4_dualscale(weight)
    return *QUANTIZERS[kind](weight), None


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 9])
def test_linear_agrees_with_float64(kind: str, dtype: torch.dtype, rows: int) -> None:
    x, weight, bias = torch.randn(rows, 600).to(dtype), torch.randn(70, 600), torch.randn(70)
    packed, scale, dual_scale = quantized(weight, kind)
    left = mx.dequantize_mx(*quantized(x, kind)).double()
    right = mx.dequantize_mx(packed, scale, dual_scale).double()
    exact = left @ right.t() + bias.double()
    result = calls.linear(mx, x, packed, scale, bias, dual_scale)
    assert result.dtype == dtype
    bound = {torch.bfloat16: 2**-8, torch.float32: 2**-21}[dtype]
    assert ((result.double() - exact).abs() <= bound * exact.abs() + 2e-6 * exact.abs().max()).all()


@pytest.mark.parametrize("kind", FORMATS)
def test_strides_and_leading_dimensions(kind: str) -> None:
    packed, scale, dual_scale = quantized(torch.randn(8, 64), kind)
    x = torch.randn(64, 3, 2).permute(2, 1, 0)
    expected = calls.linear(mx, x.contiguous(), packed, scale, None, dual_scale)
    assert torch.equal(calls.linear(mx, x, packed, scale, None, dual_scale), expected)


WITHOUT_ARITHMETIC = ("test_autograd_registration", "test_faketensor")


def test_operators_pass_opcheck() -> None:
    x = torch.randn(4, 576)
    torch.library.opcheck(mx.quantize_mxfp8_operator, (x, "ceil"), test_utils=WITHOUT_ARITHMETIC)
    torch.library.opcheck(mx.quantize_mxfp4_operator, (x, "even"))
    torch.library.opcheck(mx.quantize_mxfp4_dualscale_operator, (x, "even"))
    packed, scale, dual_scale = mx.quantize_mxfp4_dualscale(x)
    arguments = (packed, scale, packed, scale, torch.randn(4), torch.bfloat16, dual_scale, dual_scale)
    torch.library.opcheck(mx.scaled_mm_operator, arguments)


@pytest.mark.parametrize("rounding", ["floor", "ceil", "even"])
@pytest.mark.parametrize("element", QUANTIZERS)
def test_agrees_with_torchao(element: str, rounding: str) -> None:
    torchao = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    config = pytest.importorskip("torchao.prototype.mx_formats.config")
    modes = config.ScaleCalculationMode
    mode = {"floor": modes.FLOOR, "ceil": modes.RCEIL, "even": modes.EVEN}[rounding]
    x = torch.randn(64, 256) * torch.logspace(-30, 30, 64)[:, None]
    x[3] = 0
    dtype = torch.float8_e4m3fn if element == "mxfp8" else torch.float4_e2m1fn_x2
    scale, data = torchao.to_mx(x, dtype, 32, mode)
    packed, ours = QUANTIZERS[element](x, rounding)
    assert torch.equal(scale.view(torch.uint8), ours)
    assert torch.equal(data.view(torch.uint8), packed.view(torch.uint8))
