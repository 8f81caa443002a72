from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from lowbit.errors import UnsupportedError
from lowbit.ops import attention as reference
from lowbit.ops.attention import KINDS, AttentionProblem, select_kernel
from lowbit.ops.triton import attention, launch
from tests.support.attention import Case, make, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

CASES = {
    "whole blocks": Case(1, 40, 128, 1, 1, 64),
    "ragged, grouped heads": Case(2, 10, 70, 2, 1, 40),
    "one of each": Case(1, 1, 1, 1, 1, 8),
    "wide heads": Case(1, 5, 70, 1, 1, 128),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "masked", "is_causal"),
    [
        *((name, False, False) for name in CASES),
        *(("ragged, grouped heads", *flags) for flags in ((False, True), (True, False), (True, True))),
        ("whole blocks", False, True),
    ],
)
def test_equals_the_reference(device: torch.device, name: str, masked: bool, is_causal: bool, kind: str) -> None:
    query, key, value, mask = make(CASES[name], torch.float32, masked)
    scale = query.shape[-1] ** -0.5
    moved = [tensor.to(device) for tensor in (query, key, value)]
    result = attention.attention(*moved, None if mask is None else mask.to(device), scale, is_causal, kind)
    expected = reference.attention(query, key, value, mask, scale, is_causal, kind)
    # A rounding error in a score may give the neighbouring code of one weight.
    assert relative_error(result.cpu(), expected) < (1e-3 if kind == "int8" else 3e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_strides(device: torch.device, dtype: torch.dtype) -> None:
    query, key, value, _ = make(Case(1, 20, 70, 2, 2, 32), dtype, False)
    moved = [tensor.transpose(1, 2).contiguous().transpose(1, 2).to(device) for tensor in (query, key, value)]
    result = attention.attention(*moved, None, 0.2, False, "int8")
    assert result.dtype == dtype
    assert result.is_contiguous()
    expected = reference.attention(query, key, value, None, 0.2, False, "int8")
    bound = 2**-7 if dtype == torch.bfloat16 else 2**-10  # the interpreter truncates to bfloat16
    assert relative_error(result.cpu(), expected) < bound


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_poison_stays_where_the_reference_has_it(device: torch.device, kind: str, poison: float) -> None:
    for place in range(3):
        tensors = list(make(Case(1, 6, 66, 2, 2, 32), torch.float32, False)[:3])
        tensors[place][0, 3, 1, 5] = poison
        result = attention.attention(*(tensor.to(device) for tensor in tensors), None, 0.2, False, kind)
        expected = reference.attention(*tensors, None, 0.2, False, kind)
        assert torch.equal(result.cpu().isnan(), expected.isnan())


def test_a_query_without_keys_gives_zeros(device: torch.device) -> None:
    query, key, value, _ = make(Case(2, 4, 70, 1, 1, 32), torch.float32, False)
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[1] = False
    moved = [tensor.to(device) for tensor in (query, key, value, mask)]
    result = attention.attention(*moved, 0.2, False, "int8")
    assert not result[1].any()
    assert result[0].all()


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="triton: runs on cuda, xpu, not on cpu"):
        select_kernel(AttentionProblem(torch.device("cpu"), torch.bfloat16, "int8"), "triton")
    problem = AttentionProblem(torch.device("cuda"), torch.bfloat16, "int8", 256)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launch, "_accelerator", lambda _: launch.Target("cuda", 75))
    assert "SM 8.0" in str(attention.can_run(problem))
    monkeypatch.setattr(launch, "_accelerator", lambda _: launch.Target("cuda", 90))
    assert "at most 128 wide" in str(attention.can_run(problem))
