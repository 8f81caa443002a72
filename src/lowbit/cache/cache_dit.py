"""The cache-dit package behind lowbit's two options (``pip install lowbit[cache-dit]``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from torch import nn

from lowbit.cache.base import Calls, GenerationCache, RequestCache
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

    wraps_call = True

    def __init__(self, **options: Any) -> None:
        self.settings = options
        _package().DBCacheConfig(**options)

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Return the fields of ``DBCacheConfig``."""
        return tuple(item.name for item in fields(_package().DBCacheConfig))

    def check(self, transformers: Mapping[str, nn.Module]) -> None:
        """Leave it to cache-dit, which knows its models."""

    def begin(self, pipeline: Any, transformers: Mapping[str, nn.Module], steps: int) -> RequestCache:
        """Return a cache that works on the request's whole call."""
        return _Enabled(self.settings, pipeline, transformers)


class _Enabled(RequestCache):
    """cache-dit resets its state at each ``__call__`` of the pipeline that it replaces."""

    def __init__(self, settings: Mapping[str, Any], pipeline: Any, transformers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.settings, self.pipeline, self.transformers = settings, pipeline, transformers

    @contextmanager
    def working(self) -> Iterator[None]:
        """Enable the cache during the context."""
        cache_dit = _package()
        try:
            cache_dit.enable_cache(self.pipeline, cache_config=cache_dit.DBCacheConfig(**self.settings))
        except ValueError as error:
            raise ConfigError(f"cache_dit does not take this pipeline: {error}") from error
        watches = [Witness(each, Calls(self.pipeline), self.skips) for each in self.transformers.values()]
        try:
            yield
        except AssertionError as error:  # at the first step it asserts that Fn and Bn fit the number of blocks
            if "compute_blocks" not in str(error):
                raise
            raise ConfigError(f"cache_dit does not take these options for this pipeline: {error}") from error
        finally:
            for watch in watches:
                watch.remove()
            cache_dit.disable_cache(self.pipeline)
