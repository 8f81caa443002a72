"""The native norms, rotary embeddings and gates against float64, with every instruction set."""

from __future__ import annotations

import pytest
import torch

from lowbit.ops.cpu import elementwise, helper, native
from tests.support.elementwise import DTYPES, angles, exact, is_near

REFUSAL = helper.refusal()
pytestmark = [pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL)), pytest.mark.usefixtures("isa")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_weight", [False, True])
@pytest.mark.parametrize("has_frequencies", [False, True])
@pytest.mark.parametrize("epsilon", [None, 1e-6])
@pytest.mark.parametrize("width", [2, 16, 30, 128])
def test_normalize(
    width: int, epsilon: float | None, has_frequencies: bool, has_weight: bool, dtype: torch.dtype
) -> None:
    for batch, of_batch, tokens, heads in ((1, 1, 1, 1), (2, 1, 7, 3), (2, 2, 300, 3)):
        x = (torch.randn(batch, tokens, heads, width) * torch.randn(batch, tokens, 1, 1).exp()).to(dtype)
        weight = torch.rand(width).to(dtype) if has_weight else None
        frequencies = angles(of_batch, tokens, width) if has_frequencies else None
        expected = exact(x, epsilon, weight, frequencies)
        assert is_near(elementwise.normalize(x, epsilon, weight, frequencies), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_normalize_takes_any_strides_and_shapes(dtype: torch.dtype) -> None:
    x = torch.randn(3, 64, 5).to(dtype).transpose(1, 2)
    assert is_near(elementwise.normalize(x, 1e-6, None, None), exact(x, 1e-6, None, None))
    wide = torch.randn(3, native.LARGEST_NORMALIZED + 16).to(dtype)
    assert is_near(elementwise.normalize(wide, 1e-6, None, None), exact(wide, 1e-6, None, None))
    assert elementwise.normalize(torch.empty(0, 64, dtype=dtype), 1e-6, None, None).shape == (0, 64)
    heads = torch.randn(2, 4, 3, 32).to(dtype).transpose(1, 2)
    frequencies = angles(4, 3, 64).transpose(0, 1)[:1, :, :16]
    with pytest.raises(ValueError, match="do not fit"):
        elementwise.normalize(heads, None, None, frequencies)
    frequencies = angles(4, 3, 64)[:2, :, :16]
    assert is_near(elementwise.normalize(heads, None, None, frequencies), exact(heads, None, None, frequencies))


@pytest.mark.parametrize("dtype", DTYPES)
def test_normalize_passes_on_what_is_not_finite(dtype: torch.dtype) -> None:
    x = torch.randn(4, 64).to(dtype)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    x[3] = 0
    result = elementwise.normalize(x, 1e-6, None, None)
    assert result[0].isfinite().all()
    assert result[1].isnan().all()
    assert result[2].isnan().any()  # infinity over infinity
    assert bool((result[3] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 15, 4096, 4097, 100_000])
def test_gate(count: int, dtype: torch.dtype) -> None:
    gate, value = (6 * torch.randn(2, count)).to(dtype)
    expected = torch.nn.functional.silu(gate.double()) * value.double()
    result = elementwise.gate(gate, value).double()
    once = torch.finfo(dtype).eps / 2 * expected.abs()
    # 2 ** power is within 2e-7 + the rounding of the power, up to 40, in float32.
    allowed = 1.01 * once + 4e-6 * expected.abs() + torch.finfo(dtype).smallest_normal
    assert bool(((result - expected).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_at_the_ends_of_its_range(dtype: torch.dtype) -> None:
    inf, nan = torch.inf, torch.nan
    gate = torch.tensor([0.0, -0.0, 88.0, -88.0, -104.0, 6e4, -6e4, inf, -inf, nan] * 4).to(dtype)
    expected = torch.nn.functional.silu(gate.float()).to(dtype)
    result = elementwise.gate(gate, torch.ones_like(gate))
    torch.testing.assert_close(result, expected, rtol=2e-5, atol=1e-36, equal_nan=True)
