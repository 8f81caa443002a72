"""The patterns that name layers: ``ignored_layers``, and the layers a model family keeps in high precision.

A pattern is one of

* a name of whole dotted parts, anywhere in the layer's name: ``img_mlp``, ``to_out``, ``layers.0.attention``
* the same with shell wildcards: ``layers.*.attention``, ``*embed*``
* ``re:`` and a regular expression that matches from the start of the full name (as in compressed-tensors)

Names of the fused layers of vLLM-Omni's models (``to_qkv``) stand for the layers they fuse.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache

# vLLM-Omni fuses these at load; a script's ignored_layers may carry its names.
FUSED_LAYERS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "add_kv_proj": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
}


@cache
def matches(pattern: str, name: str) -> bool:
    """Tell whether ``pattern`` names the layer ``name`` or a module that contains it.

    Raises:
        re.error: a ``re:`` pattern that is not a regular expression.
    """
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    head, _, last = pattern.rpartition(".")
    if last in FUSED_LAYERS:
        prefix = f"{head}." if head else ""
        return matches_any((prefix + part for part in FUSED_LAYERS[last]), name) or _matches_parts(pattern, name)
    return _matches_parts(pattern, name)


def invalid_expression(patterns: Iterable[str]) -> str | None:
    """Return what is wrong with the first ``re:`` pattern that is not a regular expression, ``None`` if all are."""
    for pattern in patterns:
        try:
            re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
        except re.error as error:
            return f"{pattern!r} is no regular expression ({error})"
    return None


def matches_any(patterns: Iterable[str], name: str) -> bool:
    """Tell whether one of ``patterns`` matches ``name``."""
    return any(matches(pattern, name) for pattern in patterns)


def _matches_parts(pattern: str, name: str) -> bool:
    parts = name.split(".")
    runs = (".".join(parts[start:end]) for start in range(len(parts)) for end in range(start + 1, len(parts) + 1))
    return any(fnmatchcase(run, pattern) for run in runs)
