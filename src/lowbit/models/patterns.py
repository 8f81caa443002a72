"""The patterns that name layers: ``ignored_layers``, and the layers a model family keeps in high precision.

A pattern is one of

* a name of whole dotted parts, anywhere in the layer's name: ``img_mlp``, ``to_out``, ``layers.0.attention``
* the same with shell wildcards: ``layers.*.attention``, ``*embed*``
* ``re:`` and a regular expression that matches from the start of the full name (as in compressed-tensors), see
  ``lowbit.models.expressions``

Names of the fused layers of vLLM-Omni's models (``to_qkv``) stand for the layers they fuse.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import lru_cache

from lowbit.errors import ConfigError
from lowbit.models.expressions import LONGEST, check_expressions, expression_matches

MOST_PATTERNS = 20_000
MOST_WILDCARDS = 1_000
"""Patterns of one option, and those of them with shell wildcards."""
_EXPRESSION = "re:"

# vLLM-Omni fuses these at load; a script's ignored_layers may carry its names.
FUSED_LAYERS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "add_kv_proj": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
}


@lru_cache(maxsize=1 << 16)
def matches(pattern: str, name: str) -> bool:
    """Tell whether ``pattern`` names the layer ``name`` or a module that contains it.

    Raises:
        ConfigError: a ``re:`` pattern that can't be used.
    """
    if pattern.startswith(_EXPRESSION):
        return expression_matches(pattern.removeprefix(_EXPRESSION), name, anywhere=False)
    head, _, last = pattern.rpartition(".")
    if last in FUSED_LAYERS:
        prefix = f"{head}." if head else ""
        return matches_any((prefix + part for part in FUSED_LAYERS[last]), name) or _matches_parts(pattern, name)
    return _matches_parts(pattern, name)


def check_syntax(option: str, patterns: Iterable[str]) -> None:
    """Check the patterns of an option before they are used: those of a checkpoint may be anything.

    Raises:
        ConfigError: an expression that can't be used, or patterns that would take too long to match; names them.
    """
    patterns = list(patterns)
    wildcards = [pattern for pattern in patterns if not pattern.startswith(_EXPRESSION) and _has_wildcards(pattern)]
    for found, what, most in ((patterns, "patterns", MOST_PATTERNS), (wildcards, "with wildcards", MOST_WILDCARDS)):
        if len(found) > most:
            raise ConfigError(f"{option}: {len(found)} {what}, more than {most}")
    too_long = next((pattern for pattern in wildcards if len(pattern) > LONGEST), None)
    if too_long is not None:
        raise ConfigError(f"{option}: {too_long[:50]!r}... has {len(too_long)} characters, more than {LONGEST}")
    expressions = (pattern.removeprefix(_EXPRESSION) for pattern in patterns if pattern.startswith(_EXPRESSION))
    check_expressions(option, expressions)


def matches_any(patterns: Iterable[str], name: str) -> bool:
    """Tell whether one of ``patterns`` matches ``name``."""
    return any(matches(pattern, name) for pattern in patterns)


def _has_wildcards(pattern: str) -> bool:
    return any(character in pattern for character in "*?[")


def _matches_parts(pattern: str, name: str) -> bool:
    if not _has_wildcards(pattern):
        return f".{pattern}." in f".{name}."
    parts = name.split(".")
    runs = (".".join(parts[start:end]) for start in range(len(parts)) for end in range(start + 1, len(parts) + 1))
    return any(fnmatchcase(run, pattern) for run in runs)
