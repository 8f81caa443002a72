"""What a cache is to the engine, and the table of caches."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lowbit.errors import ConfigError, expected_one_of


@dataclass
class Skips:
    """Which transformer calls of a generation reused what was cached.

    Attributes:
        calls: step -> transformer calls made in it (two with separate guidance).
        skipped: step -> those that did not run the transformer's blocks.
    """

    calls: Counter[int] = field(default_factory=Counter)
    skipped: Counter[int] = field(default_factory=Counter)

    def note(self, step: int, skipped: bool) -> None:
        """Count a call."""
        self.calls[step] += 1
        self.skipped[step] += skipped

    def steps(self) -> list[int]:
        """Return the steps all of whose calls were skipped, from 0."""
        return sorted(step for step, count in self.calls.items() if self.skipped[step] == count)


class RequestCache(ABC):
    """The cache of one request: it owns all that is remembered between steps.

    Attributes:
        skips: which calls reused what was cached.
    """

    def __init__(self) -> None:
        self.skips = Skips()

    @abstractmethod
    def working(self) -> AbstractContextManager[None]:
        """Work on the transformers' calls that this thread makes during the context."""

    def end(self) -> None:  # noqa: B027 (most hold nothing)
        """Let go of the transformers: the request makes no more calls."""


class GenerationCache(ABC):
    """A cache, configured. It holds nothing of a generation: each has a ``RequestCache`` of its own."""

    runs_compiled = False
    """Whether it works with compiled blocks."""

    wraps_call = False
    """Whether it needs the pipeline's own ``__call__``, so that a generation can't be taken step by step."""

    @classmethod
    @abstractmethod
    def options(cls) -> tuple[str, ...]:
        """Return the names of ``cache_config``."""

    @abstractmethod
    def check(self, transformers: Mapping[str, nn.Module]) -> None:
        """Raise ``ConfigError`` where it can't work on one of the pipeline's transformers."""

    def install(self, transformers: Mapping[str, nn.Module]) -> None:  # noqa: B027 (most need none)
        """Prepare the transformers, once after loading."""

    @abstractmethod
    def begin(self, pipeline: Any, transformers: Mapping[str, nn.Module], steps: int) -> RequestCache:
        """Return the cache of a request.

        Args:
            pipeline: the request's view of it, whose scheduler tells the step.
            transformers: component -> what to work on.
            steps: denoising steps of the request.
        """

    @contextmanager
    def active(self, pipeline: Any, transformers: Mapping[str, nn.Module], steps: int) -> Iterator[Skips]:
        """Work during the context: one whole generation of ``steps`` steps."""
        request = self.begin(pipeline, transformers, steps)
        try:
            with request.working():
                yield request.skips
        finally:
            request.end()


# Name -> (module, class), imported when asked for.
_BACKENDS: dict[str, tuple[str, str]] = {
    "tea_cache": ("lowbit.cache.tea_cache", "TeaCache"),
    "first_block_cache": ("lowbit.cache.diffusers_caches", "FirstBlockCache"),
    "mag_cache": ("lowbit.cache.diffusers_caches", "MagCache"),
    "taylorseer": ("lowbit.cache.diffusers_caches", "TaylorSeer"),
    "pyramid_attention": ("lowbit.cache.diffusers_caches", "PyramidAttention"),
    "cache_dit": ("lowbit.cache.cache_dit", "CacheDit"),
}

CACHE_BACKENDS: tuple[str, ...] = tuple(_BACKENDS)


def build_cache(backend: str | None, config: Mapping[str, Any] | None = None) -> GenerationCache | None:
    """Return a cache by name.

    Args:
        backend: one of ``CACHE_BACKENDS``; ``None`` or ``"none"``: no cache.
        config: its options.

    Raises:
        ConfigError: an unknown name, option or value, or a package that is missing.
    """
    if backend is None or backend.lower() == "none":
        if config:
            raise ConfigError(f"cache_config needs a cache_backend: one of {', '.join(CACHE_BACKENDS)}")
        return None
    entry = _BACKENDS.get(backend.lower().replace("-", "_"))
    if entry is None:
        raise ConfigError(f"Unknown cache_backend: {backend!r}. {expected_one_of(CACHE_BACKENDS)}")
    module, name = entry
    cache_class: type[GenerationCache] = getattr(importlib.import_module(module), name)
    options = dict(config or {})
    unknown = [option for option in options if option not in cache_class.options()]
    if unknown:
        raise ConfigError(
            f"{backend} has no option {', '.join(map(repr, unknown))}. {expected_one_of(cache_class.options())}"
        )
    try:
        return cache_class(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"cache_config of {backend}: {error}") from error


@dataclass
class Calls:
    """Where a transformer's call is in the generation.

    The step is that of the pipeline's scheduler; a further call in the same step is another branch of guidance,
    whatever the pipeline calls it.
    """

    pipeline: Any
    step: int = -1
    branch: int = 0

    def begin(self) -> tuple[int, int]:
        """Return (step, branch) of the call that begins."""
        index = getattr(self.pipeline.scheduler, "step_index", None)
        step = 0 if index is None else int(index)
        self.branch = self.branch + 1 if step == self.step else 0
        self.step = step
        return step, self.branch
