"""Products of few rows of bfloat16 with int8 weights that are multiplied as they are, by AMX, against float64."""

from __future__ import annotations

import pytest
import torch

from lowbit.ops import int8
from lowbit.ops.cpu.int8_weight_only import int8_weight_only_mm
from tests.support.cpu import at_the_end_of_memory, awkward

NEEDS_ISA = "AMX"

MOST_ROWS = 21  # three times as many fill the tiles
ROWS = pytest.mark.parametrize("rows", [1, 2, 5, 6, 10, 11, 16, MOST_ROWS])


def layer(features: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return int8.quantize_int8_per_token(torch.randn(features, columns) / 8)


def check(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Within 2**-22 of a row's largest activation, and what sums in float32 lose."""
    result, weight = int8_weight_only_mm(x, codes, scale, bias), codes.double() * scale.double()
    expected = x.double() @ weight.t() + (0 if bias is None else bias.double())
    largest = x.double().abs().amax(dim=1, keepdim=True).expand_as(x)
    lost = 2.0**-22 * (largest + x.double().abs()) @ weight.abs().t()
    assert result.dtype == torch.bfloat16
    assert ((result.double() - expected).abs() <= lost + 2.0**-8 * expected.abs() + 1e-37).all()


@ROWS
@pytest.mark.parametrize("columns", [20, 64, 100, 320, 1046, 4096])
@pytest.mark.parametrize("features", [16, 48, 80])
def test_close_to_float64(features: int, columns: int, rows: int) -> None:
    codes, scale = layer(features, columns)
    check(torch.randn(rows, columns).bfloat16(), codes, scale, torch.randn(features))
    check(awkward(rows, columns, torch.bfloat16), codes, scale)


@ROWS
def test_magnitudes_at_the_ends_of_the_type(rows: int) -> None:
    codes, _ = layer(16, 128)
    x = torch.randn(rows, 128) * 2.0 ** torch.randint(-140, 110, (rows, 1))
    check(x.bfloat16(), codes, torch.full((16, 1), 2.0**-8))
    largest = torch.full((rows, 128), torch.finfo(torch.bfloat16).max)
    check(largest.bfloat16(), codes, torch.full((16, 1), 2.0**-20))


@ROWS
def test_all_bits_of_activations_within_a_millionth_of_the_largest_count(rows: int) -> None:
    codes = torch.randint(-127, 128, (16, 64), dtype=torch.int8)
    x = torch.zeros(rows, 64)
    x[:, 0], x[:, 1] = 1.0, 1.9921875 * 2.0**-14
    codes[:, 0] = 0
    expected = (x[:, 1:2] * codes[:, 1].float()).bfloat16()
    assert torch.equal(int8_weight_only_mm(x.bfloat16(), codes, torch.ones(16, 1), None), expected)


@ROWS
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_give_nothing_finite(poison: float, rows: int) -> None:
    x = torch.randn(rows, 64)
    x[-1, 5] = poison
    codes, scale = layer(16, 64)
    result = int8_weight_only_mm(x.bfloat16(), codes.clamp(min=1), scale, None)
    assert not result[-1].isfinite().any()
    assert result[:-1].isfinite().all()


@ROWS
@pytest.mark.parametrize("columns", [60, 128, 325])
def test_reads_nothing_beyond_a_weight(columns: int, rows: int) -> None:
    codes, scale = layer(48, columns)
    check(torch.randn(rows, columns).bfloat16(), at_the_end_of_memory(codes), at_the_end_of_memory(scale))


def test_rows_apart() -> None:
    codes, scale = layer(32, 64)
    x = torch.randn(4, 99).bfloat16()[:, 7:71]
    check(x, codes, scale)
