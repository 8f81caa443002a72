"""Products of few rows of bfloat16 with int4 and int8 in groups, multiplied as integers by AMX, against float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from lowbit.ops import w4a16, w8a16
from lowbit.ops.cpu import w4a16 as cpu_w4a16
from lowbit.ops.cpu import w8a16 as cpu_w8a16
from tests.support.cpu import at_the_end_of_memory, awkward

NEEDS_ISA = "AMX"

MOST_ROWS = 16
ROWS = {
    "int4": (3, 5, 8),
    "int4 asymmetric": (3, 5, 8),
    "int8": (1, 8, 9, MOST_ROWS),
    "int8 asymmetric": (1, 8, 9, MOST_ROWS),
}
KIND = pytest.mark.parametrize("kind", ROWS)
KIND_AND_ROWS = pytest.mark.parametrize(("kind", "rows"), [(kind, rows) for kind in ROWS for rows in ROWS[kind]])
SCALE_DTYPES = pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
SMALLEST_LARGEST = 2.0**-95  # activations of units below lose more


@dataclass
class Layer:
    """A random weight [features, columns] in groups."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        product = cpu_w4a16.w4a16_mm if self.codes.dtype == torch.uint8 else cpu_w8a16.w8a16_mm
        return product(x, self.codes, self.scale, bias, self.zero)

    def weight(self) -> torch.Tensor:
        """What it stands for, float32."""
        decode = w4a16.dequantize_int4 if self.codes.dtype == torch.uint8 else w8a16.dequantize_int8_groups
        return decode(self.codes, self.scale, self.zero)


def make(kind: str, features: int, columns: int, group_size: int, scale_dtype: torch.dtype = torch.float32) -> Layer:
    scale = ((torch.rand(features, columns // group_size) + 0.1) / 100).to(scale_dtype)
    if kind.startswith("int4"):
        codes = torch.randint(0, 256, (features, columns // 2), dtype=torch.uint8)
        zero = torch.randint(0, 16, scale.shape, dtype=torch.uint8)
    else:
        codes = torch.randint(-128, 128, (features, columns), dtype=torch.int8)
        zero = torch.randint(-128, 129, scale.shape, dtype=torch.int16)
    return Layer(codes, scale, zero if "asymmetric" in kind else None)


def check(layer: Layer, x: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Within what is lost of activations, by sums in float32, and by rounding the result.

    An activation loses at most 2**-15 of the largest of its unit: 128 inputs, or 64 where that does not divide a group.
    """
    result, weight = layer.linear(x, bias), layer.weight().double()
    exact = x.double() @ weight.t() + (0 if bias is None else bias.double())
    group_size = x.shape[1] // layer.scale.shape[1]
    units = x.double().abs().split(64 if group_size % 128 else 128, dim=1)
    largest = torch.cat([unit.amax(dim=1, keepdim=True).expand_as(unit) for unit in units], dim=1)
    size = weight.abs().t()
    lost = 2.0**-15 * largest.clamp(min=SMALLEST_LARGEST) @ size
    summed = 2.0**-20 * (largest @ size + exact.abs())
    assert result.dtype == torch.bfloat16
    assert ((result.double() - exact).abs() <= 2.0**-8 * exact.abs() + lost + summed).all()


@KIND_AND_ROWS
@SCALE_DTYPES
@pytest.mark.parametrize(("columns", "group_size"), [(64, 64), (1088, 64), (1280, 128), (1152, 192), (1344, 1344)])
def test_close_to_float64(columns: int, group_size: int, kind: str, scale_dtype: torch.dtype, rows: int) -> None:
    for features in (16, 80):
        layer = make(kind, features, columns, group_size, scale_dtype)
        check(layer, torch.randn(rows, columns).bfloat16(), torch.randn(features))
        check(layer, awkward(rows, columns, torch.bfloat16))


@KIND
@pytest.mark.parametrize(("columns", "group_size"), [(2176, 64), (2432, 128), (576, 192)])
def test_every_input_is_multiplied_with_its_weight(columns: int, group_size: int, kind: str) -> None:
    layer = make(kind, 48, columns, group_size)
    for rows in (8, ROWS[kind][-1]):
        found = torch.cat([layer.linear(x) for x in torch.eye(columns).bfloat16().split(rows)])
        assert torch.equal(found, layer.weight().bfloat16().t())


@KIND_AND_ROWS
def test_the_ends_of_the_type(kind: str, rows: int) -> None:
    layer = make(kind, 16, 256, 128)
    check(layer, (torch.randn(rows, 256) * 2.0 ** torch.randint(-140, 110, (rows, 1))).bfloat16())
    layer.scale.fill_(2.0**-20)
    check(layer, torch.full((rows, 256), torch.finfo(torch.bfloat16).max).bfloat16())


@KIND_AND_ROWS
def test_eight_bits_of_each_activation_count(kind: str, rows: int) -> None:
    """Down to 1/64 of a unit's largest, whose own bits may all be ones."""
    layer = make(kind, 16, 128, 128)
    x = torch.zeros(rows, 128)
    x[:, 77] = 1.9921875
    expected = (x[:, 77:78] * layer.weight()[:, 77]).bfloat16()
    assert torch.equal(layer.linear(x.bfloat16()), expected)
    is_int4 = layer.codes.dtype == torch.uint8
    layer.codes[:, : 2 if is_int4 else 4] = 8 * 17 if is_int4 else 0
    if layer.zero is not None:
        layer.zero.fill_(8 if is_int4 else 0)
        expected = (x[:, 77:78] * layer.weight()[:, 77]).bfloat16()
    x[:, 3] = 1.9921875 * 64  # its weight is zero
    assert torch.equal(layer.linear(x.bfloat16()), expected)


@KIND_AND_ROWS
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_give_nothing_finite(poison: float, kind: str, rows: int) -> None:
    x = torch.randn(rows, 192)
    x[-1, 150] = poison
    result = make(kind, 32, 192, 64).linear(x.bfloat16())
    assert not result[-1].isfinite().any()
    assert result[:-1].isfinite().all()


@KIND_AND_ROWS
@pytest.mark.parametrize(("columns", "group_size"), [(64, 64), (384, 128)])
def test_reads_nothing_beyond_a_weight(columns: int, group_size: int, kind: str, rows: int) -> None:
    layer = make(kind, 48, columns, group_size, torch.bfloat16)
    layer.codes, layer.scale = at_the_end_of_memory(layer.codes), at_the_end_of_memory(layer.scale)
    layer.zero = None if layer.zero is None else at_the_end_of_memory(layer.zero)
    check(layer, at_the_end_of_memory(torch.randn(rows, columns).bfloat16()))


@KIND
def test_rows_apart(kind: str) -> None:
    x = torch.randn(5, 259).bfloat16()[:, 3:259]
    check(make(kind, 32, 256, 128), x)


@KIND
def test_the_same_with_any_threads(kind: str) -> None:
    layer, x = make(kind, 1040, 1024, 128), torch.randn(7, 1024).bfloat16()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(layer.linear(x))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
