"""Optimization: less memory and time for the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lowbit.engine.load import Loaded
from lowbit.engine.placement import keep_embeddings_on_host, set_aside


@dataclass(frozen=True, kw_only=True)
class Optimized:
    """What was done.

    Attributes:
        set_aside: component -> layers that are not computed, because the pipeline does not look at their results.
        on_host: component -> table of embeddings that stays in the CPU's memory.
        compiled: names of the components whose repeated blocks are compiled.
    """

    set_aside: Mapping[str, list[str]] = field(default_factory=dict)
    on_host: Mapping[str, str] = field(default_factory=dict)
    compiled: tuple[str, ...] = ()


def optimize(loaded: Loaded) -> Optimized:
    """Prepare a loaded, calibrated pipeline for many requests, in place."""
    transformers = loaded.transformers()
    if loaded.cache is not None:
        loaded.cache.install(transformers)
    aside = set_aside(loaded.pipeline)
    on_host = {} if loaded.device.type == "cpu" else keep_embeddings_on_host(loaded.pipeline)
    if not loaded.config.enforce_eager:
        for transformer in transformers.values():
            transformer.compile_repeated_blocks(fullgraph=True)
    compiled = () if loaded.config.enforce_eager else tuple(transformers)
    return Optimized(set_aside=aside, on_host=on_host, compiled=compiled)
