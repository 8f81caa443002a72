"""Products of up to four rows with weights that are looked up in registers, by AVX512-BF16, against float64."""

from __future__ import annotations

import pytest
import torch

from lowbit.ops import fp8
from lowbit.ops.cpu import fp8 as cpu_fp8
from lowbit.ops.cpu import helper
from tests.support.few_rows import GROUPS, UNIT, Linear, make
from tests.support.four_bits import FORMATS

NEEDS_ISA = "AVX512-BF16"
REFUSAL = helper.refusal()
pytestmark = pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))

KINDS = ["fp8", "fp8 128", *FORMATS, *GROUPS]


def make_layer(kind: str, features: int, columns: int) -> tuple[Linear, torch.Tensor]:
    """Return a layer of a random weight [features, columns] and what the weight stands for, float64."""
    if not kind.startswith("fp8"):
        return make(kind, features, columns)
    weight, block = torch.randn(features, columns) / 8, None if kind == "fp8" else (128, 128)
    quantized = fp8.quantize_fp8_per_token(weight) if block is None else fp8.quantize_fp8_per_block(weight, block)
    decoded = fp8.dequantize_fp8(*quantized, block).double()
    return lambda x, bias: cpu_fp8.fp8_weight_only_mm(x, *quantized, bias, block), decoded


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_rounded_but_sums_and_results(kind: str, rows: int) -> None:
    """Of activations as of weights: next to an outlier, too."""
    linear, weight = make_layer(kind, 133, 1536)
    x = torch.randn(rows, 1536) * torch.randn(1536).exp()
    x[0, 5], x[-1, 1300] = 3e4, -3e4
    x = x.bfloat16()
    exact = x.double() @ weight.t()
    groups = weight.abs().unflatten(1, (-1, 32)).amax(dim=2).repeat_interleave(32, dim=1)
    summed = (
        x.double().abs() @ (groups if "asymmetric" in kind else weight.abs()).t()
    )  # zero points are subtracted later
    error = (linear(x, None).double() - exact).abs()
    assert (error <= 2.0**-8 * exact.abs() + 2.0**-21 * summed).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_in_its_row(kind: str) -> None:
    linear, _ = make_layer(kind, 20, 512)
    x = torch.randn(4, 512).bfloat16()
    clean = linear(x, None)
    x[1, 300], x[3, 0] = float("nan"), float("inf")
    result = linear(x, None)
    assert result[1].isnan().all()
    assert not result[3].isfinite().any()
    assert torch.equal(result[::2], clean[::2])


@pytest.mark.parametrize("columns", [UNIT, 512])
def test_a_nan_of_a_weight_stays_in_its_channel(columns: int) -> None:
    codes, scale = fp8.quantize_fp8_per_token(torch.randn(21, columns))
    x = torch.randn(3, columns).bfloat16()
    clean = cpu_fp8.fp8_weight_only_mm(x, codes, scale, None, None)
    poisoned = codes.clone()
    poisoned.view(torch.uint8)[4, 77], poisoned.view(torch.uint8)[20, columns - 1] = 0x7F, 0xFF
    result = cpu_fp8.fp8_weight_only_mm(x, poisoned, scale, None, None)
    others = [i for i in range(21) if i not in (4, 20)]
    assert result[:, [4, 20]].isnan().all()
    assert torch.equal(result[:, others], clean[:, others])
