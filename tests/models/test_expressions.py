"""Expressions are held against Python's ``re``, which defines what they mean."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import ConfigError
from lowbit.models.expressions import LONGEST, MOST_WORK, check_expressions, compile_expression

NAMES = [
    "",
    "lm_head",
    "model.lm_head",
    "model.layers.0.self_attn.q_proj",
    "model.layers.12.mlp.experts.3.gate_proj",
    "transformer_blocks.10.attn.to_out.0",
    "transformer_blocks.1.ff.net.0.proj",
    "a\n",
    "größe.٣",
]
# What compressed-tensors, ModelOpt, AutoRound, Quark and lowbit itself have in their configurations.
WRITTEN = [
    ".*lm_head",
    "model.lm_head",
    r".*mlp\.(gate|up|gate_up|down)_proj.*",
    r"model\.layers\.[01]\..*",
    r"model\.layers\.(0|12)\..*",
    r".*\.layers\.\d{1,2}\..*proj$",
    "^(?!.*experts).*$",
    r"^(?!.*\.mlp\.experts(?:\.|$)).*$",
    r"^(?!.*self_attn\.(?:q_proj|k_proj|v_proj)$).*$",
    r"transformer_blocks\.1(\..*)?$",
    r"(?!layers\.[12]\.attention)",
    r"(?P<kind>.+?)\.(?:to_out|net)\.0\b",
    r"(\w+\.)*to_\w+(\.\d+)*\Z",
]  # fmt: skip

_atoms = st.sampled_from(["a", "b", ".", "\\.", "[ab]", "[^a]", "\\d", "\\W", "\\b", "^", "$", "\\Z", "", "\n"])
_quantifiers = st.sampled_from(["", "", "*", "+", "?", "*?", "{2}", "{1,2}", "{0,}", "{2,}"])


def _grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    groups = st.tuples(st.sampled_from(["(", "(?:", "(?=", "(?!"]), inner, _quantifiers)
    return st.one_of(
        st.lists(inner, max_size=3).map("".join),
        st.tuples(inner, inner).map("|".join),
        groups.map(lambda parts: f"{parts[0]}{parts[1]}){parts[2] if parts[0] in ('(', '(?:') else ''}"),
    )


_pieces = st.tuples(_atoms, _quantifiers).map(lambda pair: pair[0] + (pair[1] if pair[0] not in ("^", "$") else ""))
_expressions = st.recursive(_pieces, _grown, max_leaves=6)


def refusal_of(expression: str) -> str | None:
    try:
        compile_expression(expression)
    except ConfigError as error:
        return str(error)
    return None


def same_as_python(expression: str, name: str) -> None:
    compiled = compile_expression(expression)
    assert compiled.is_in(name, anywhere=False) == (re.match(expression, name) is not None)
    assert compiled.is_in(name, anywhere=True) == (re.search(expression, name) is not None)


@pytest.mark.parametrize("expression", WRITTEN)
def test_what_tools_write(expression: str) -> None:
    for name in NAMES:
        same_as_python(expression, name)


@settings(max_examples=1000, deadline=None)
@given(_expressions, st.text("ab.1\n", max_size=6))
def test_any_expression(expression: str, name: str) -> None:
    try:
        re.compile(expression)
    except re.error:
        with pytest.raises(ConfigError, match="is no regular expression"):
            compile_expression(expression)
        return
    refusal = refusal_of(expression)
    assert refusal is None or "not matched here" in refusal
    if refusal is None:
        same_as_python(expression, name)


@settings(max_examples=300, deadline=None)
@given(st.text("ab()[]{}*+?|\\^$.,12<>=!:P-", max_size=20))
def test_any_text(text: str) -> None:
    refusal = refusal_of(text)
    assert refusal is None or repr(text) in refusal
    if refusal is None:
        compile_expression(text).is_in("layers.1.ab", anywhere=True)


@pytest.mark.parametrize(
    "expression",
    [
        "(a+)+b",
        "(a|a)*b",
        "(a|aa)+b",
        "(a*)*b",
        "(.*)*b",
        "(a?c?a?)*b",
        "(|a)+b",
        "a*" * 300 + "b",
        "a?" * 300 + "a" * 120,
        "(a|a)" * 150 + "b",
        "(?:a{1,99}){1,99}b",
        "(?!(a+)b).*b",
        "(?=a*a*a*a*a*b)a",
        "a{100000000}",
        "(a{1000}b?){1000000}",
    ],
)
def test_what_backtracking_never_finishes(expression: str) -> None:
    name = "a" * 100 + "!"
    refusal = refusal_of(expression)
    assert refusal is None or "not matched here" in refusal
    if refusal is None:
        compiled = compile_expression(expression)
        assert not compiled.is_in(name, anywhere=False)
        assert not compiled.is_in(name, anywhere=True)


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("(", "is no regular expression"),
        ("(" * 40 + ")" * 40, "groups in more than 20 others"),
        ("(" * 500 + ")" * 500, "is no regular expression|groups in more than 20 others"),
        ("a" * (LONGEST + 1), f"has {LONGEST + 1} characters, more than {LONGEST}"),
        (r"(a)\1", "groupref"),
        (r"(a)?(?(1)b|c)", "groupref exists"),
        ("(?<=a)b", "look-behind"),
        ("(?<!a)b", "look-behind"),
        ("(?i)a", "flags"),
        ("(?i:a)b", "flags"),
        ("((ab)*c)*", "a repeated group or look-ahead inside of another"),
        ("(?!(ab)*c)", "a repeated group or look-ahead inside of another"),
    ],
)
def test_what_is_refused(expression: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        compile_expression(expression)


def test_work_is_bounded() -> None:
    check_expressions("ignored_layers", (rf"transformer_blocks\.{index}\.norm1(\..*)?$" for index in range(5000)))
    with pytest.raises(ConfigError, match="option: these expressions are too many or too complicated"):
        check_expressions("option", (f"(a|{index})*" for index in range(MOST_WORK // 50)))
