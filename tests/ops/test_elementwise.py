"""Norms, rotary embeddings and gates against float64 and against diffusers' own functions."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm

from lowbit.ops import elementwise

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def exact(
    x: torch.Tensor, epsilon: float | None, weight: torch.Tensor | None, frequencies: torch.Tensor | None
) -> torch.Tensor:
    """Return ``normalize`` in float64, by complex numbers."""
    result = x.double()
    if epsilon is not None:
        result = result / (result.square().mean(-1, keepdim=True) + epsilon).sqrt()
    if weight is not None:
        result = result * weight.double()
    if frequencies is not None:
        turned = torch.view_as_complex(result.unflatten(-1, (-1, 2)).contiguous())
        turned = turned * torch.view_as_complex(frequencies.double()).unsqueeze(2)
        result = torch.view_as_real(turned).flatten(-2)
    return result


def angles(batch: int, tokens: int, width: int) -> torch.Tensor:
    """Return cosine and sine of random angles, [batch, tokens, width / 2, 2]."""
    return torch.view_as_real(
        torch.polar(torch.ones(batch, tokens, width // 2), 7 * torch.randn(batch, tokens, width // 2))
    )


def is_near(result: torch.Tensor, expected: torch.Tensor, units: float = 0.5) -> bool:
    """Whether ``result`` is rounded once, by ``units``, after some errors of float32 as to the largest of its row."""
    once = torch.finfo(result.dtype).eps * units * expected.abs()
    error = (result.double() - expected).abs()
    smallest = torch.finfo(result.dtype).smallest_normal
    return bool((error <= 1.01 * once + 2e-6 * expected.abs().amax(-1, keepdim=True) + smallest).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_is_what_diffusers_computes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(32, eps=1e-5)
    norm.weight.data = torch.rand(32)
    x, frequencies = torch.randn(2, 7, 3, 32), angles(2, 7, 32)
    theirs = apply_rotary_emb(norm(x), torch.view_as_complex(frequencies), use_real=False)
    torch.testing.assert_close(elementwise.normalize(x, 1e-5, norm.weight, frequencies), theirs)
    result = elementwise.normalize(x.to(dtype), 1e-5, norm.weight.to(dtype), frequencies)
    assert is_near(result, exact(x.to(dtype), 1e-5, norm.weight.to(dtype), frequencies))
    gate, value = torch.randn(2, 5, 40).to(dtype)
    assert is_near(elementwise.gate(gate, value), torch.nn.functional.silu(gate.double()) * value.double())


def test_what_does_not_fit_is_refused() -> None:
    x = torch.randn(2, 5, 3, 8)
    with pytest.raises(ValueError, match=r"weight has to be \[8\], not \[4\]"):
        elementwise.normalize(x, 1e-5, torch.ones(4), None)
    for bad in (angles(3, 5, 8), angles(2, 4, 8), angles(2, 5, 10), angles(2, 5, 8).double()):
        with pytest.raises(ValueError, match=r"do not fit x \[2, 5, 3, 8\]"):
            elementwise.normalize(x, None, None, bad)
    with pytest.raises(ValueError, match="gate and value differ"):
        elementwise.gate(x, x[:1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operators_are_well_formed(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 3, 8).to(dtype)
    for arguments in ((x, 1e-5, torch.rand(8).to(dtype), angles(1, 5, 8)), (x, None, None, None)):
        torch.library.opcheck(elementwise.normalize_operator, arguments)
    torch.library.opcheck(elementwise.gate_operator, (x, x.flip(0).contiguous()))
