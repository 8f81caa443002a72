"""Expressions are held against Python's ``re``, which defines what they mean."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import ConfigError
from lowbit.models import expressions
from lowbit.models.expressions import LONGEST, check_expressions, expression_matches

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


def same_as_python(expression: str, name: str) -> None:
    assert expression_matches(expression, name, anywhere=False) == (re.match(expression, name) is not None)
    assert expression_matches(expression, name, anywhere=True) == (re.search(expression, name) is not None)


@pytest.mark.parametrize("expression", WRITTEN)
def test_what_tools_write(expression: str) -> None:
    for name in NAMES:
        same_as_python(expression, name)


def outcome(expression: str, text: str, *, anywhere: bool = True) -> bool | str:
    """Return whether it matches, or the error's text."""
    try:
        return expression_matches(expression, text, anywhere=anywhere)
    except ConfigError as error:
        return str(error)


@settings(max_examples=300, deadline=None)
@given(st.text("ab()[]{}*+?|\\^$.,12<>=!:P-", max_size=20))
def test_any_text_is_an_expression_or_an_error_that_quotes_it(text: str) -> None:
    found = outcome(text, "layers.1.ab")
    assert isinstance(found, bool) or repr(text) in found


@pytest.mark.parametrize("anywhere", [False, True])
@pytest.mark.parametrize(
    "expression",
    ["(a+)+b", "(a|a)*b", "(a|aa)+b", "(a*)*b", "(.*)*b", "(a?c?a?)*b", "a?" * 300 + "a" * 120, "(?!(a+)+b).*b"],
)
def test_what_backtracking_never_finishes(expression: str, anywhere: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "PATIENCE_S", 0.05)
    found = outcome(expression, "a" * 100 + "!", anywhere=anywhere)
    assert found is False or "takes too long to match" in str(found)


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("(", "is no regular expression"),
        ("(" * 500 + ")", "is no regular expression"),
        ("a" * (LONGEST + 1), f"has {LONGEST + 1} characters, more than {LONGEST}"),
    ],
)
def test_what_is_refused(expression: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"ignored_layers: .*{reason}"):
        check_expressions("ignored_layers", ["lm_head", expression])
