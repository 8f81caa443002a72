"""Norms with rotary embeddings, and gates, in Triton against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from lowbit.hosts import fused
from lowbit.ops import elementwise as reference
from lowbit.ops.triton import elementwise
from tests.support.elementwise import angles, exact, is_near
from tests.support.models import FAMILIES

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def is_close(result: torch.Tensor, expected: torch.Tensor) -> bool:
    """As ``is_near``; the interpreter cuts bfloat16 off where chips round it."""
    return is_near(result.cpu(), expected, 1.0 if result.dtype == torch.bfloat16 and not result.is_cuda else 0.5)


def inputs(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Random rows, some of them zero, tiny or large."""
    torch.manual_seed(sum(shape))
    x = torch.randn(shape)
    rows = x.view(-1, shape[-1])
    rows[0], rows[1] = 0.0, rows[1] * 1e-4
    rows[-1] *= 1e3
    return x.to(dtype)


@DTYPES
@pytest.mark.parametrize("shape", [(2, 7, 3, 128), (1, 5, 2, 96), (3, 1, 1, 6), (2, 9, 3840)])
@pytest.mark.parametrize("epsilon", [1e-5, None])
def test_normalize_against_float64(
    device: torch.device, shape: tuple[int, ...], epsilon: float | None, dtype: torch.dtype
) -> None:
    x, weight = inputs(*shape, dtype=dtype), torch.rand(shape[-1]).to(dtype) + 0.5
    several = [None] if len(shape) < 4 else [None, angles(1, *shape[1:4:2]), angles(shape[0], *shape[1:4:2])]
    for frequencies in several:
        for given in (None, weight):
            on_device = [None if t is None else t.to(device) for t in (given, frequencies)]
            result = elementwise.normalize(x.to(device), epsilon, *on_device)
            assert result.dtype == dtype
            assert is_close(result, exact(x, epsilon, given, frequencies))


@DTYPES
def test_rows_that_are_not_dense(device: torch.device, dtype: torch.dtype) -> None:
    x = inputs(2, 6, 3, 64, dtype=dtype).transpose(1, 2)
    frequencies = angles(1, 3, 64)
    result = elementwise.normalize(x.to(device), 1e-6, None, frequencies.to(device))
    assert result.is_contiguous()
    assert is_close(result, exact(x, 1e-6, None, frequencies))


def test_what_is_not_finite_stays_in_its_row(device: torch.device) -> None:
    x = torch.randn(4, 64)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    result = elementwise.normalize(x.to(device), 1e-6, None, None).cpu()
    assert result.isfinite().all(dim=1).tolist() == [True, False, False, True]


def test_long_rows_and_none(device: torch.device) -> None:
    x = torch.randn(2, elementwise.LONGEST_ROW + 2, device=device)
    assert torch.equal(elementwise.normalize(x, 1e-6, None, None), reference.normalize(x, 1e-6, None, None))
    assert elementwise.normalize(x[:0, :64], 1e-6, None, None).shape == (0, 64)
    assert elementwise.gate(x[:0], x[:0]).shape == (0, x.shape[1])


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    x = torch.randn(2, 5, 3, 8, device=device)
    with pytest.raises(ValueError, match="weight has to be"):
        elementwise.normalize(x, 1e-5, torch.ones(4, device=device), None)
    with pytest.raises(ValueError, match="do not fit"):
        elementwise.normalize(x, None, None, angles(3, 5, 8).to(device))
    with pytest.raises(ValueError, match="gate and value differ"):
        elementwise.gate(x, x[:1])


@DTYPES
@pytest.mark.parametrize("shape", [(3, 5), (2, 7, 333), (2048,), (3, 4097)])
def test_gate_against_float64(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate, value = (8 * torch.randn(2, *shape)).to(dtype)
    gate.view(-1)[0], gate.view(-1)[1] = -90.0, 90.0
    result = elementwise.gate(gate.to(device), value.to(device))
    assert is_close(result, torch.nn.functional.silu(gate.double()) * value.double())


@pytest.mark.parametrize("name", ["z-image", "qwen-image"])
def test_models_compute_with_them(device: torch.device, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model: Any = FAMILIES[name].make().eval()
    before = FAMILIES[name].run(model).double()
    calls: list[tuple[int, ...]] = []

    def normalize(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(tuple(x.shape))
        return elementwise.normalize(x.to(device), *(t.to(device) if torch.is_tensor(t) else t for t in rest)).cpu()

    monkeypatch.setattr(fused, "FEWEST_ELEMENTS", 1)
    monkeypatch.setattr(fused, "normalize_operator", normalize)
    assert fused.fuse_elementwise(model, device=torch.device("cuda"), dtype=torch.float32) > 0
    after = FAMILIES[name].run(model).double()
    assert calls
    assert (after - before).norm() < 1e-5 * before.norm()
