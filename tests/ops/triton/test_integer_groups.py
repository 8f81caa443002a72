from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from lowbit.ops import w4a16, w8a16
from lowbit.ops.triton import w4a16 as triton_w4a16
from lowbit.ops.triton import w8a16 as triton_w8a16
from lowbit.ops.triton.integer_groups import FUSED_ROWS

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def weight_of(
    bits: int, rows: int, columns: int, groups: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    scale = torch.rand(rows, groups) / 8 + 0.01
    if bits == 4:
        zero = None if symmetric else torch.randint(0, 17, (rows, groups), dtype=torch.uint8)
        packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
        return packed, scale, zero, w4a16.dequantize_int4(packed, scale, zero)
    zero = None if symmetric else torch.randint(-128, 129, (rows, groups), dtype=torch.int16)
    packed = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    return packed, scale, zero, w8a16.dequantize_int8_groups(packed, scale, zero)


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("m", "k", "n", "groups"), [(1, 256, 40, 2), (5, 96, 33, 3), (37, 160, 70, 1)])
def test_product_against_float64(
    device: torch.device, dtype: torch.dtype, bits: int, symmetric: bool, m: int, k: int, n: int, groups: int
) -> None:
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies bfloat16's bits")
    packed, scale, zero, decoded = weight_of(bits, n, k, groups, symmetric)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    function = triton_w4a16.w4a16_mm if bits == 4 else triton_w8a16.w8a16_mm
    on_device = [None if part is None else part.to(device) for part in (x, packed, scale, bias, zero)]
    result = function(*on_device).cpu()
    weight = decoded.to(dtype).double()
    exact = x.double() @ weight.t() + bias.double()
    magnitude = x.double().abs() @ weight.abs().t() + bias.double().abs()
    assert result.dtype == dtype
    assert ((result.double() - exact).abs() <= BOUNDS[dtype] * exact.abs() + 1e-6 * magnitude).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_many_rows_take_the_decoded_weight(device: torch.device, bits: int) -> None:
    packed, scale, zero, decoded = weight_of(bits, 24, 64, 2, False)
    x = torch.randn(FUSED_ROWS, 64)
    function = triton_w4a16.w4a16_mm if bits == 4 else triton_w8a16.w8a16_mm
    result = function(*(part.to(device) for part in (x, packed, scale)), None, zero.to(device)).cpu()
    torch.testing.assert_close(result, x @ decoded.t(), rtol=1e-4, atol=1e-4)


def test_nan_and_infinity_reach_the_result(device: torch.device) -> None:
    packed, scale, _, _ = weight_of(4, 24, 64, 2, True)
    packed[:, 1] |= 0x10  # no code is 8, the zero point, at column 3: infinity times zero would be NaN
    x = torch.zeros(2, 64)
    x[0, 3], x[1, 3] = torch.nan, torch.inf
    result = triton_w4a16.w4a16_mm(x.to(device), packed.to(device), scale.to(device), None).cpu()
    assert result[0].isnan().all()
    assert not result[1].isfinite().any()
