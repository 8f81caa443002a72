"""Products of up to four rows in integers, of every format that is multiplied so, against float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from lowbit.ops.cpu import helper
from tests.support.few_rows import GGUF_TYPES, GROUPS, MOST_INTEGER_ROWS, UNIT, make

pytestmark = pytest.mark.skipif(
    not helper.available() or not helper.multiplies_int8(), reason="the CPU has no AVX512-VNNI"
)

ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = pytest.mark.parametrize("dtype", ROUNDING)
KINDS = [
    "int8",
    "int8 128",
    "int8 128 asymmetric",
    "int8 0 asymmetric",
    *GROUPS,
    "mxfp4",
    "dualscale",
    "nvfp4",
    *GGUF_TYPES,
]


@pytest.fixture(autouse=True)
def _isa(wide_isa: str) -> None:
    """Run by what takes bfloat16 as it is, and by what takes float32."""


def largest_of_units(x: torch.Tensor) -> torch.Tensor:
    """For each element of ``x`` [M, K] the largest magnitude of its unit, float64."""
    largest = x.double().abs().unflatten(1, (-1, UNIT)).amax(dim=2, keepdim=True)
    return largest.expand(-1, -1, UNIT).flatten(1)


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_float64(kind: str, dtype: torch.dtype, wide_isa: str) -> None:
    """Within what is lost of activations (2**-16 of the largest of a unit), in sums and by rounding the result."""
    linear, weight = make(kind, 37, 768)
    bias = torch.randn(37).to(dtype)
    most_rows = MOST_INTEGER_ROWS[wide_isa if dtype == torch.bfloat16 else "AVX-512"]
    for rows, given in itertools.product(range(1, most_rows + 1), (None, bias)):
        x = torch.randn(rows, 768)
        x[0] *= torch.randn(768).exp()  # with outliers
        x[-1, :UNIT] = 0.0
        x = x.to(dtype)
        exact = x.double() @ weight.t() + (0 if given is None else given.double())
        result = linear(x, given)
        assert result.dtype == dtype
        lost = largest_of_units(x) @ weight.abs().t() * 2.0**-16
        summed = (x.double().abs() @ weight.abs().t() + exact.abs()) * 2.0**-19  # in float32, of larger numbers
        assert ((result.double() - exact).abs() <= ROUNDING[dtype] * exact.abs() + lost + summed + 1e-7).all()


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
def test_every_input_is_multiplied_with_its_weight(kind: str, dtype: torch.dtype) -> None:
    columns = 256
    linear, weight = make(kind, 9, columns)
    found = torch.cat([linear(rows.to(dtype), None) for rows in torch.eye(columns).split(2)])
    error = (found.double() - weight.t()).abs()
    assert (error <= ROUNDING[dtype] * weight.t().abs() + 2.0**-19 * weight.abs().amax(dim=1)).all()


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e30])
@pytest.mark.parametrize("kind", ["int8", "symmetric 128", "nvfp4", "Q8_0", "Q4_K"])
def test_activations_of_any_size(kind: str, size: float) -> None:
    linear, weight = make(kind, 20, 512)
    x = torch.randn(2, 512, dtype=torch.bfloat16)
    x[1] *= size
    exact = x.double() @ weight.t()
    bound = 2.0**-8 * exact.abs() + 2.0**-15 * (largest_of_units(x) @ weight.abs().t())
    assert ((linear(x, None).double() - exact).abs() <= bound).all()


@DTYPES
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["int8", "symmetric 128", "mxfp4", "Q8_0", "Q6_K"])
def test_poisoned_rows_and_only_they_are_not_finite(kind: str, poison: float, dtype: torch.dtype) -> None:
    linear, _ = make(kind, 20, 512)
    x = torch.randn(2, 512).to(dtype)
    x[1, 300] = poison
    result = linear(x, None)
    assert not result[1].isfinite().any()
    assert result[0].isfinite().all()


@pytest.mark.parametrize("kind", ["int8", "asymmetric 32", "nvfp4", "Q8_0", "Q5_K"])
def test_rows_that_are_apart_and_many_channels(kind: str) -> None:
    linear, _ = make(kind, 1031, 512)  # more than one task, and the last is not whole
    x = torch.randn(2, 1024).bfloat16()[:, :512]
    expected = torch.cat([linear(row[None].contiguous(), None) for row in x])
    assert torch.equal(linear(x, None), expected)


@pytest.fixture
def threads() -> Iterator[None]:
    """Give tests that choose a number of threads theirs only."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kind", ["int8", "mxfp4", "Q4_K"])
def test_the_same_with_any_threads(kind: str) -> None:
    linear, _ = make(kind, 500, 2048)
    x = torch.randn(2, 2048).bfloat16()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(linear(x, None))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
