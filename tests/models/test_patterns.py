from __future__ import annotations

import pytest

from lowbit.errors import ConfigError
from lowbit.models.patterns import MOST_PATTERNS, MOST_WILDCARDS, check_syntax, matches

QWEN = "transformer_blocks.3.img_mlp.net.0.proj"


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("img_mlp", QWEN, True),
        ("img_mlp.net", QWEN, True),
        ("transformer_blocks.3", QWEN, True),
        (QWEN, QWEN, True),
        ("img_mod", "transformer_blocks.0.img_mod.1", True),
        ("img_mod.1", "transformer_blocks.0.img_mod.1", True),
        ("img", QWEN, False),
        ("transformer_blocks.3", "transformer_blocks.30.img_mlp", False),
        ("blocks.3", "transformer_blocks.3.img_mlp", False),
        ("layers.*.attention", "layers.12.attention.to_q", True),
        ("*embed*", "context_embedder.linear_1", True),
        ("*embed*", "layers.0.attention", False),
        ("layers.[01].attention", "layers.2.attention.to_q", False),
        ("re:proj_out$", "proj_out", True),
        ("re:proj_out$", "single_transformer_blocks.0.proj_out", False),
        (r"re:.*\.to_(q|k)$", "layers.0.attention.to_k", True),
        ("to_qkv", "layers.0.attention.to_k", True),
        ("attention.to_qkv", "layers.0.attention.to_v", True),
        ("to_qkv", "layers.0.attention.to_out.0", False),
        ("to_qkv", "blocks.0.to_qkv", True),
        ("w13", "layers.0.feed_forward.w3", True),
        ("w13", "layers.0.feed_forward.w2", False),
    ],
)
def test_matches(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_patterns_of_a_checkpoint_are_checked() -> None:
    check_syntax("ignored_layers", ["re:a.*", "a(", "*", *(f"layers.{index}.to_q" for index in range(5000))])
    for patterns, message in [
        (["to_q", "re:("], r"ignored_layers: '\(' is no regular expression"),
        (["*a"] * (MOST_WILDCARDS + 1), "1001 with wildcards, more than 1000"),
        (["a"] * (MOST_PATTERNS + 1), "20001 patterns, more than 20000"),
        (["*" + "a" * 2000], "2001 characters, more than 1000"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_syntax("ignored_layers", patterns)


def test_wildcards_that_backtracking_never_finishes() -> None:
    assert not matches("*a*" * 300 + "b", "a" * 100 + "!")
