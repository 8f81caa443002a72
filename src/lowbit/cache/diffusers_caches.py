"""diffusers' own caches behind lowbit's two options; their settings are theirs, by their names."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, ClassVar

from torch import nn

from lowbit.cache.base import Calls, GenerationCache, RequestCache, Skips
from lowbit.compat.parts.modules import hook_registry
from lowbit.errors import ConfigError

# What lowbit fills in, from the pipeline and the request.
_FILLED = ("current_timestep_callback", "num_inference_steps")


class _DiffusersCache(GenerationCache):
    """A cache that diffusers' ``CacheMixin.enable_cache`` takes the configuration of."""

    config_name: str

    def __init__(self, **options: Any) -> None:
        self.settings = options
        self._config(None, 8)  # finds missing and wrong values now

    @classmethod
    def _class(cls) -> Any:
        import diffusers

        found = getattr(diffusers, cls.config_name, None)
        if found is None:
            raise ConfigError(f"diffusers {diffusers.__version__} has no {cls.config_name}")
        return found

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """Return the fields of diffusers' configuration that can be written in a file."""
        return tuple(item.name for item in fields(cls._class()) if item.name not in _FILLED)

    def _config(self, pipeline: Any, steps: int) -> Any:
        found = self._class()
        filled: dict[str, Any] = {
            "current_timestep_callback": lambda: pipeline.current_timestep,
            "num_inference_steps": steps,
        }
        known = {item.name for item in fields(found)}
        return found(**self.settings, **{name: value for name, value in filled.items() if name in known})

    def check(self, transformers: Mapping[str, nn.Module]) -> None:
        """Raise ``ConfigError`` for a transformer that diffusers has no caches for."""
        for transformer in transformers.values():
            if not hasattr(transformer, "enable_cache"):
                raise ConfigError(
                    f"diffusers has no caches for {type(transformer).__name__} (it is no CacheMixin): use tea_cache"
                )

    def enter_branch(self, transformer: nn.Module, branch: int) -> None:
        """Prepare for a call of this branch of guidance. diffusers' caches do so by ``cache_context``."""

    def begin(self, pipeline: Any, transformers: Mapping[str, nn.Module], steps: int) -> RequestCache:
        """Return a cache that has the transformers to itself during its steps."""
        return _Enabled(transformers, Calls(pipeline), self._config(pipeline, steps), self.enter_branch)


# What a hook of diffusers remembers between calls, by the names of its attributes.
_REMEMBERED = ("state_manager", "state", "lowbit_states")
_Memory = dict[tuple[str, str], dict[str, Any]]


class _Enabled(RequestCache):
    """diffusers keeps a cache's state in hooks on the transformer's blocks: they are this request's in its steps.

    They stay until another request needs the transformer; then what they remember is kept here.
    """

    _owners: ClassVar[weakref.WeakKeyDictionary[nn.Module, _Enabled]] = weakref.WeakKeyDictionary()

    def __init__(
        self,
        transformers: Mapping[str, nn.Module],
        calls: Calls,
        config: Any,
        enter_branch: Callable[[nn.Module, int], None],
    ) -> None:
        super().__init__()
        self.transformers, self.config, self.enter_branch = transformers, config, enter_branch
        self.calls = {name: replace(calls) for name in transformers}
        self.memories: dict[str, _Memory] = {}
        self.watches: dict[str, Witness] = {}

    @contextmanager
    def working(self) -> Iterator[None]:
        """Put the hooks on the transformers, if they are not there."""
        for name, transformer in self.transformers.items():
            owner = self._owners.get(transformer)
            if owner is not self:
                if owner is not None:
                    owner._leave(transformer)
                self._take(name, transformer)
        yield

    def end(self) -> None:
        """Take the hooks off."""
        for transformer in self.transformers.values():
            if self._owners.get(transformer) is self:
                self._leave(transformer)
        self.memories.clear()

    def _take(self, name: str, transformer: Any) -> None:
        transformer.enable_cache(self.config)
        hooks = _hooks(transformer)
        for place, remembered in self.memories.pop(name, {}).items():
            vars(hooks[place]).update(remembered)
        self.watches[name] = Witness(transformer, self.calls[name], self.skips, self.enter_branch)
        self._owners[transformer] = self

    def _leave(self, transformer: Any) -> None:
        name = next(name for name, each in self.transformers.items() if each is transformer)
        self.memories[name] = {
            place: {key: value for key, value in vars(hook).items() if key in _REMEMBERED}
            for place, hook in _hooks(transformer).items()
        }
        self.watches.pop(name).remove()
        transformer.disable_cache()
        del self._owners[transformer]


def _hooks(transformer: nn.Module) -> dict[tuple[str, str], Any]:
    """Return the hooks of diffusers on a model's modules by (module's name, hook's name)."""
    return {
        (name, kind): hook
        for name, module in transformer.named_modules()
        for kind, hook in getattr(hook_registry(module), "hooks", {}).items()
    }


class FirstBlockCache(_DiffusersCache):
    """Runs the first block and skips the others while its residual hardly changes."""

    config_name = "FirstBlockCacheConfig"


class MagCache(_DiffusersCache):
    """Skips by the model's known ratios of residuals' magnitudes."""

    config_name = "MagCacheConfig"


class TaylorSeer(_DiffusersCache):
    """Predicts features by Taylor expansion over steps."""

    config_name = "TaylorSeerCacheConfig"


class PyramidAttention(_DiffusersCache):
    """Reuses attention's outputs for a few steps."""

    config_name = "PyramidAttentionBroadcastConfig"

    def enter_branch(self, transformer: nn.Module, branch: int) -> None:
        """Give each branch of guidance a state of its own: diffusers keeps one per layer."""
        for module in transformer.modules():
            registry = hook_registry(module)
            hook = registry.get_hook("pyramid_attention_broadcast") if registry is not None else None
            if hook is not None:
                states = vars(hook).setdefault("lowbit_states", {})
                hook.state = states.setdefault(branch, hook.state if not states else type(hook.state)())


class Witness:
    """Notes, for every call of a transformer, whether a linear layer in the middle of its blocks ran.

    With ``enter_branch`` it also tells diffusers' cache which branch of guidance a call is, for pipelines that do not.
    """

    def __init__(
        self,
        transformer: Any,
        calls: Calls,
        skips: Skips,
        enter_branch: Callable[[nn.Module, int], None] | None = None,
    ) -> None:
        self.calls, self.skips, self.enter_branch = calls, skips, enter_branch
        self.ran = False
        self.context: Any = None
        self.transformer = transformer
        self.handles = [
            transformer.register_forward_pre_hook(self._begin),
            transformer.register_forward_hook(self._end, always_call=True),
            middle_linear(transformer).register_forward_hook(self._note),
        ]

    def _begin(self, *_: Any) -> None:
        self.ran = False
        self.step, branch = self.calls.begin()
        if self.enter_branch is not None:
            self.enter_branch(self.transformer, branch)
            self.context = self.transformer.cache_context(f"branch {branch}")
            self.context.__enter__()

    def _note(self, *_: Any) -> None:
        self.ran = True

    def _end(self, *_: Any) -> None:
        if self.context is not None:
            self.context.__exit__(None, None, None)
        self.skips.note(self.step, not self.ran)

    def remove(self) -> None:
        """Stop watching."""
        for handle in self.handles:
            handle.remove()


def middle_linear(transformer: nn.Module) -> nn.Linear:
    """Return a linear layer, of the feed-forward if possible, of the block in the middle of all blocks."""
    blocks = [block for child in transformer.children() if isinstance(child, nn.ModuleList) for block in child]
    layers = {name: layer for name, layer in blocks[len(blocks) // 2].named_modules() if isinstance(layer, nn.Linear)}
    # Attention may be reused alone, and norms' modulation may run for a decision: neither makes a block run.
    outside = [
        layer for name, layer in layers.items() if not any(part in name for part in ("attn", "attention", "norm"))
    ]
    return (outside or list(layers.values()))[-1]
