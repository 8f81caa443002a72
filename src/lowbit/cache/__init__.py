"""Cache acceleration: denoising steps that reuse what an earlier one computed."""

from lowbit.cache.base import CACHE_BACKENDS, GenerationCache, build_cache

__all__ = ["CACHE_BACKENDS", "GenerationCache", "build_cache"]
