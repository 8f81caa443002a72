"""The attention reference, and its operator, against float64."""

from __future__ import annotations

import logging

import pytest
import torch

from lowbit.errors import ConfigError, UnsupportedError
from lowbit.ops import attention
from lowbit.ops.attention import KINDS, UNQUANTIZED, AttentionProblem, attention_operator, check_kind, select_kernel
from tests.support.attention import Case, exact, make, relative_error

CPU = torch.device("cpu")
BOUNDS = {"int8": 0.012, "fp8": 0.05}
"""Relative error (Frobenius) on normal values; what was seen is about half of it."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", [Case(2, 50, 131, 4, 2, 40), Case(1, 130, 64, 2, 2, 128), Case(1, 1, 1, 1, 1, 8)])
def test_is_near_exact_attention(case: Case, masked: bool, is_causal: bool, kind: str) -> None:
    query, key, value, mask = make(case, torch.float32, masked)
    scale = case.width**-0.5
    result = attention.attention(query, key, value, mask, scale, is_causal, kind)
    assert result.shape == query.shape
    assert result.is_contiguous()
    assert relative_error(result, exact(query, key, value, mask, scale, is_causal)) < BOUNDS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_means_of_keys_and_values_cost_nothing(kind: str) -> None:
    query, key, value, _ = make(Case(1, 40, 100, 2, 2, 64), torch.float32, False)
    shift = 64.0 * torch.arange(-32, 32).float()  # what it does to the scores is the same for every key
    plain = attention.attention(query, key, value, None, 0.1, False, kind)
    shifted = attention.attention(query, key + shift, value + 1000, None, 0.1, False, kind)
    assert relative_error(shifted - 1000, plain) < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_mask_leaves_out_counts_nowhere(kind: str) -> None:
    query, key, value, mask = make(Case(2, 20, 90, 2, 2, 32), torch.float32, True)
    assert mask is not None
    expected = attention.attention(query, key, value, mask, 0.2, False, kind)
    for filling in (1e6, float("nan")):
        key[~mask], value[~mask] = filling, filling
        assert torch.equal(attention.attention(query, key, value, mask, 0.2, False, kind), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_is_the_same_everywhere_is_the_result(kind: str) -> None:
    query, key, value, _ = make(Case(1, 10, 70, 1, 1, 16), torch.float32, False)
    value[:] = torch.linspace(-3, 1000, 16)
    result = attention.attention(query, key, value, None, 1.0, False, kind)
    torch.testing.assert_close(result, value[:, :10], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_poison_shows_where_it_should(kind: str, poison: float) -> None:
    for place, expected in ((0, (3, slice(None))), (1, (slice(None), slice(None))), (2, (slice(None), 5))):
        tensors = list(make(Case(1, 6, 66, 2, 2, 32), torch.float32, False)[:3])
        tensors[place][0, 3, 1, 5] = poison
        nan = torch.zeros(1, 6, 2, 32, dtype=torch.bool)
        nan[0, :, 1][expected] = True
        assert torch.equal(attention.attention(*tensors, None, 0.2, False, kind).isnan(), nan)


def test_a_query_without_keys_gives_zeros() -> None:
    query, key, value, _ = make(Case(2, 4, 70, 1, 1, 32), torch.float32, False)
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[1] = False
    result = attention.attention(query, key, value, mask, 0.2, False, "int8")
    assert not result[1].any()
    assert result[0].all()
    assert attention_operator(query, key[:, :0], value[:, :0], None, 0.2, False, "int8", "reference").any() == False  # noqa: E712


@pytest.mark.parametrize("kernel", ["reference", "native", "sdpa"])
def test_the_operator_is_well_formed(kernel: str) -> None:
    kind = UNQUANTIZED if kernel == "sdpa" else "int8"
    problem = AttentionProblem(CPU, torch.float32, kind)
    implementation = next(entry for entry in attention.IMPLEMENTATIONS if entry.name == kernel)
    if implementation.refusal(problem) is not None:
        pytest.skip(str(implementation.refusal(problem)))
    query, key, value, mask = make(Case(2, 5, 70, 2, 1, 16), torch.float32, True)
    torch.library.opcheck(attention_operator, (query, key, value, mask, 0.2, False, kind, kernel))


def test_masks_of_every_form() -> None:
    query, key, value, mask = make(Case(2, 5, 70, 2, 2, 16), torch.float32, True)
    assert mask is not None

    def run(given: torch.Tensor | None) -> torch.Tensor:
        result: torch.Tensor = attention_operator(query, key, value, given, 0.2, False, "int8", "reference")
        return result

    expected = attention.attention(query, key, value, mask, 0.2, False, "int8")
    assert torch.equal(run(mask), expected)
    assert torch.equal(run(mask[:, None, None, :]), expected)
    first = mask[:1].expand(2, -1)
    assert torch.equal(run(mask[:1]), attention.attention(query, key, value, first, 0.2, False, "int8"))
    assert torch.equal(run(torch.ones_like(mask)), run(None))


@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_per_query_is_computed_unquantized_and_said(caplog: pytest.LogCaptureFixture, additive: bool) -> None:
    query, key, value, mask = make(Case(2, 5, 70, 2, 2, 16), torch.float32, True)
    assert mask is not None
    full = mask[:, None, None, :].expand(2, 1, 5, 70)
    given = torch.zeros(full.shape).masked_fill(~full, -torch.inf) if additive else full
    attention._tell_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            result = attention_operator(query, key, value, given, 0.2, False, "int8", "reference")
    assert relative_error(result, exact(query, key, value, mask, 0.2)) < 1e-5
    assert len(caplog.records) == 1
    assert "this attention is not quantized" in caplog.text


def test_selection() -> None:
    problem = AttentionProblem(CPU, torch.float64, "int8", 64)
    with pytest.raises(UnsupportedError, match="native: "):
        select_kernel(problem, "native")
    with pytest.raises(UnsupportedError, match="does not quantize"):
        select_kernel(problem, "sdpa")
    assert select_kernel(problem) == "reference"
    assert select_kernel(AttentionProblem(torch.device("meta"), torch.bfloat16, UNQUANTIZED)) == "sdpa"


def test_kinds() -> None:
    assert check_kind("INT8") == "int8"
    assert check_kind(None) == check_kind("none") == UNQUANTIZED
    with pytest.raises(ConfigError, match="Unknown attention_quantization: 'int4'. Expected one of: int8, fp8, none"):
        check_kind("int4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": (2, 70, 3, 16)}, "a divisor"),
        ({"key": (1, 70, 2, 16)}, "does not fit query"),
        ({"value": (2, 71, 2, 16)}, "value has to have the shape of key"),
        ({"query": (5, 2, 16)}, r"\[batch, tokens, heads, head_dim\]"),
    ],
)
def test_shapes_that_do_not_fit(change: dict[str, tuple[int, ...]], message: str) -> None:
    shapes = {"query": (2, 5, 2, 16), "key": (2, 70, 2, 16), "value": (2, 70, 2, 16), **change}
    with pytest.raises(ValueError, match=message):
        attention_operator(*(torch.zeros(shape) for shape in shapes.values()), None, 0.2, False, "int8", "reference")
