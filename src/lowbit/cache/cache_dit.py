"""The cache-dit package behind lowbit's two options (``pip install lowbit[cache-dit]``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from torch import nn

from lowbit.cache.base import Calls, GenerationCache, Skips
from lowbit.cache.diffusers_caches import Witness
from lowbit.errors import ConfigError


def _package() -> Any:
    try:
        import cache_dit
    except ImportError as error:
        raise ConfigError('cache_dit needs the package cache-dit: pip install "lowbit[cache-dit]"') from error
    return cache_dit


class CacheDit(GenerationCache):
    """cache-dit's dual block cache; the options are those of its ``DBCacheConfig``."""

    def __init__(self, **options: Any) -> None:
        self.settings = options
        _package().DBCacheConfig(**options)

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Return the fields of ``DBCacheConfig``."""
        return tuple(item.name for item in fields(_package().DBCacheConfig))

    def check(self, transformers: Mapping[str, nn.Module]) -> None:
        """Leave it to cache-dit, which knows its models."""

    @contextmanager
    def active(self, pipeline: Any, transformers: Mapping[str, nn.Module], steps: int) -> Iterator[Skips]:
        """Enable the cache during the context."""
        cache_dit, skips = _package(), Skips()
        try:
            cache_dit.enable_cache(pipeline, cache_config=cache_dit.DBCacheConfig(**self.settings))
        except ValueError as error:
            raise ConfigError(f"cache_dit does not take this pipeline: {error}") from error
        watches = [Witness(transformer, Calls(pipeline), skips) for transformer in transformers.values()]
        try:
            yield skips
        except AssertionError as error:  # at the first step it asserts that Fn and Bn fit the number of blocks
            if "compute_blocks" not in str(error):
                raise
            raise ConfigError(f"cache_dit does not take these options for this pipeline: {error}") from error
        finally:
            for watch in watches:
                watch.remove()
            cache_dit.disable_cache(pipeline)
