"""The native attention against the reference and against float64."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import UnsupportedError
from lowbit.ops import attention as reference
from lowbit.ops import sdpa
from lowbit.ops.attention import KINDS, UNQUANTIZED, AttentionProblem
from lowbit.ops.cpu import attention, helper
from tests.support.attention import Case, exact, make, relative_error

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
REFUSAL = attention.can_run(AttentionProblem(CPU, torch.float32, "int8"))
NEEDS_KERNEL = pytest.mark.skipif(REFUSAL is not None, reason=str(REFUSAL))
CASES = {
    "whole blocks": Case(1, 96, 128, 2, 2, 64),
    "ragged": Case(2, 101, 77, 4, 2, 40),
    "more queries than a block": Case(1, 333, 129, 3, 1, 128),
    "widest": Case(1, 50, 70, 1, 1, 256),
    "narrow": Case(3, 7, 65, 2, 2, 6),
    "one of each": Case(1, 1, 1, 1, 1, 8),
}


@NEEDS_KERNEL
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str, dtype: torch.dtype, masked: bool, is_causal: bool, kind: str) -> None:
    query, key, value, mask = make(CASES[name], dtype, masked)
    scale = query.shape[-1] ** -0.5
    result = attention.attention(query, key, value, mask, scale, is_causal, kind)
    expected = reference.attention(query, key, value, mask, scale, is_causal, kind)
    assert result.dtype == dtype
    # A rounding error in a score may give the neighbouring code of one weight.
    assert relative_error(result, expected) < (5e-4 if kind == "int8" else 2e-3) + ROUNDING[dtype] / 2


@NEEDS_KERNEL
@pytest.mark.usefixtures("vectors_or_tiles")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_unquantized_is_as_near_float64_as_torch(name: str, dtype: torch.dtype, masked: bool, is_causal: bool) -> None:
    query, key, value, mask = make(CASES[name], dtype, masked)
    scale = query.shape[-1] ** -0.5
    expected = exact(query, key, value, mask, scale, is_causal)
    error = relative_error(attention.attention(query, key, value, mask, scale, is_causal, UNQUANTIZED), expected)
    theirs = relative_error(sdpa.attention(query, key, value, mask, scale, is_causal, UNQUANTIZED), expected)
    assert error <= max(1.02 * theirs, 1e-6)


def _hard(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return attention that integers with a common exponent find hard."""
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(1, 300, 2, 64, generator=generator) for _ in range(3))
    if name == "few keys matter":
        query, key = 6 * query, 6 * key
    elif name == "flat":
        query, key, value = query / 100, key / 100, value / 1000
    elif name == "an outlier in queries and keys":
        query[..., 3] *= 50
        key[..., 3] *= 50
    elif name == "an outlier with a mean":
        query[..., 3] += 300
        key[..., 3] += 100
    elif name == "one key takes all":
        key[:, 0] *= 60
    elif name == "a value outlier":
        value[:, 7] *= 1000
    elif name == "largest sums":
        signs = (torch.arange(300) % 2 * 2 - 1)[None, :, None, None].float()
        query, key, value = 3 * torch.ones_like(query), 3 * signs * torch.ones_like(key), signs * torch.ones_like(value)
    return query.bfloat16(), key.bfloat16(), value.bfloat16()


@NEEDS_KERNEL
@pytest.mark.usefixtures("vectors_or_tiles")
@pytest.mark.parametrize(
    "name",
    [
        "few keys matter", "flat", "an outlier in queries and keys", "an outlier with a mean", "one key takes all",
        "a value outlier", "largest sums",
    ],
)  # fmt: skip
def test_bfloat16_loses_no_more_than_rounding_the_result_may(name: str) -> None:
    query, key, value = _hard(name)
    expected = exact(query, key, value, None, 0.125)
    result = attention.attention(query, key, value, None, 0.125, False, UNQUANTIZED)
    rounding = relative_error(expected.bfloat16(), expected)
    assert relative_error(result, expected) ** 2 <= rounding**2 + 2.0**-18


@NEEDS_KERNEL
@pytest.mark.parametrize("kind", KINDS)
def test_softmax_carried_over_rising_and_falling_scores(kind: str) -> None:
    query, key, value, _ = make(Case(1, 60, 1000, 1, 1, 32), torch.float32, False)
    for slope in (0.02, -0.02):
        steep = key + slope * torch.arange(1000)[None, :, None, None] * query[:, :1].sign()
        result = attention.attention(query, steep, value, None, 0.2, False, kind)
        assert relative_error(result, reference.attention(query, steep, value, None, 0.2, False, kind)) < 2e-3


@NEEDS_KERNEL
@pytest.mark.usefixtures("vectors_or_tiles")
@pytest.mark.parametrize("kind", [*KINDS, UNQUANTIZED])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_poison_stays_where_the_reference_has_it(kind: str, poison: float) -> None:
    for place in range(3):
        tensors = list(make(Case(1, 6, 66, 2, 2, 32), torch.float32, False)[:3])
        tensors[place][0, 3, 1, 5] = poison
        result = attention.attention(*tensors, None, 0.2, False, kind)
        if kind == UNQUANTIZED:  # an infinite value is an infinite result, as it is in torch
            for each in (result, attention.attention(*(t.bfloat16() for t in tensors), None, 0.2, False, kind)):
                assert not each[0, :, 0].isnan().any()
                assert not each[0, 3, 1, 5].isfinite()
        else:
            assert torch.equal(result.isnan(), reference.attention(*tensors, None, 0.2, False, kind).isnan())


@NEEDS_KERNEL
@pytest.mark.usefixtures("vectors_or_tiles")
@pytest.mark.parametrize("kind", [*KINDS, UNQUANTIZED])
def test_masked_keys_are_not_looked_at_and_no_keys_give_zeros(kind: str) -> None:
    query, key, value, _ = make(Case(2, 4, 200, 1, 1, 32), torch.float32, False)
    mask = torch.ones(2, 200, dtype=torch.bool)
    mask[0, 3], mask[0, 64:128], mask[1] = False, False, False
    expected = attention.attention(query, key, value, mask, 0.2, False, kind)
    key[~mask], value[~mask] = float("nan"), float("inf")
    result = attention.attention(query, key, value, mask, 0.2, False, kind)
    assert torch.equal(result, expected)
    assert not result[1].any()
    assert result[0].all()


@NEEDS_KERNEL
@pytest.mark.usefixtures("vectors_or_tiles")
@pytest.mark.parametrize("kind", ["int8", UNQUANTIZED])
@pytest.mark.parametrize("scale", [-0.2, 0.0, 1e-20, 40.0])
def test_any_scale(scale: float, kind: str) -> None:
    query, key, value, mask = make(CASES["ragged"], torch.bfloat16, True)
    result = attention.attention(query, key, value, mask, scale, False, kind)
    if kind == "int8":
        expected, allowed = reference.attention(query, key, value, mask, scale, False, kind), 5e-3
    else:
        expected = exact(query, key, value, mask, scale, False)
        theirs = sdpa.attention(query, key, value, mask, scale, False, UNQUANTIZED)
        allowed = relative_error(theirs, expected) + 2**-11
    assert relative_error(result, expected) <= allowed


@NEEDS_KERNEL
@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_outliers(kind: str) -> None:
    query, key, value, _ = make(Case(1, 20, 100, 2, 2, 48), torch.float32, False)
    query[0, 3], key[0, 5], value[0, 7] = 0, 0, 0
    query[0, 4, 0, 2], key[0, 6, 0, 2], value[0, 8, 1, 3] = 500, 500, -3000
    key[0, :, 1] = 1.5
    result = attention.attention(query, key, value, None, 0.2, False, kind)
    assert relative_error(result, reference.attention(query, key, value, None, 0.2, False, kind)) < 2e-3
    zeros = torch.zeros_like(query)
    assert not attention.attention(zeros, zeros, zeros, None, 0.2, False, kind).any()


@NEEDS_KERNEL
def test_strides() -> None:
    query, key, value, _ = make(Case(2, 30, 70, 4, 2, 32), torch.float32, False)
    expected = attention.attention(query, key, value, None, 0.2, False, "int8")
    head_first = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (query, key, value)]
    assert torch.equal(attention.attention(*head_first, None, 0.2, False, "int8"), expected)
    last = [tensor.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0) for tensor in (query, key, value)]
    assert torch.equal(attention.attention(*last, None, 0.2, False, "int8"), expected)


@NEEDS_KERNEL
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_work_is_divided_without_loss(threads: int) -> None:
    query, key, value, _ = make(Case(2, 200, 300, 4, 2, 64), torch.float32, False)
    expected = [attention.attention(query, key, value, None, 0.2, False, kind) for kind in KINDS]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for kind, wanted in zip(KINDS, expected, strict=True):
            assert torch.equal(attention.attention(query, key, value, None, 0.2, False, kind), wanted)
    finally:
        torch.set_num_threads(before)


def test_refuses_what_it_cannot_do(path: str) -> None:
    def refusal(dtype: torch.dtype, width: int | None = None) -> str:
        return attention.can_run(AttentionProblem(CPU, dtype, "int8", width)) or ""

    if path == "torch":
        assert refusal(torch.float32) == "native helper turned off by LOWBIT_NATIVE=0"
    elif helper.multiplies_int8():
        assert not refusal(torch.float32)
        assert "float64" in refusal(torch.float64)
        assert "at most 256 wide, not 264" in refusal(torch.float32, 264)
        wide = torch.zeros(1, 2, 1, 264)
        with pytest.raises(UnsupportedError, match="at most 256"):
            attention.attention(wide, wide, wide, None, 1.0, False, "int8")
    else:
        assert "AVX512-VNNI" in refusal(torch.float32)
