"""Norms, rotary embeddings and gates against float64 and against diffusers' own functions."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm

from lowbit.ops import elementwise
from tests.support.elementwise import DTYPES, angles, exact, is_near


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
