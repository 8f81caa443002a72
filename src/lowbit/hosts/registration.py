"""Registering lowbit with diffusers, transformers, accelerate and peft once they are imported, without importing them.

The first two keep their quantizers in a module ``<library>.quantizers.auto``. If that module is there already, lowbit
registers at once; if not, a finder on ``sys.meta_path`` waits for it and registers when it has been executed. The same
goes for the modules that bring adapters to layers, that move layers' parameters, that tell a model's dtype and that
load weights without a quantizer.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

# The library's module -> ours, whose register(module) does the work.
from lowbit.compat.parts.importing import is_initializing

_PLUGINS = {
    "diffusers.quantizers.auto": ("lowbit.hosts.diffusers",),
    "transformers.quantizers.auto": ("lowbit.hosts.transformers",),
    "diffusers.models.modeling_utils": ("lowbit.compat.patches.dtypes", "lowbit.compat.patches.codes"),
    "transformers.modeling_utils": ("lowbit.compat.patches.dtypes", "lowbit.compat.patches.codes"),
    "diffusers.loaders.single_file_model": ("lowbit.compat.patches.codes",),
    "diffusers.schedulers.scheduling_flow_match_euler_discrete": ("lowbit.compat.patches.schedules",),
    "diffusers.loaders.lora_pipeline": ("lowbit.compat.patches.lora",),
    "diffusers.loaders.peft": ("lowbit.compat.patches.lora",),
    "peft.tuners.lora.layer": ("lowbit.compat.patches.lora",),
    "peft.tuners.lora.dora": ("lowbit.compat.patches.lora",),
    "peft.tuners.lycoris_utils": ("lowbit.compat.patches.lora",),
    "accelerate.utils.modeling": ("lowbit.compat.patches.offloading",),
    "accelerate.utils": ("lowbit.compat.patches.offloading",),
    "accelerate.hooks": ("lowbit.compat.patches.offloading",),
    "diffusers.hooks.group_offloading": ("lowbit.compat.patches.offloading",),
}


def install() -> None:
    """Register with the libraries that are imported, and arrange for it with those that may be later.

    Calling it again changes nothing.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name in _PLUGINS:
        module = sys.modules.get(name)
        if module is not None and not is_initializing(module):  # which still lacks its tables
            _register(module)


def _register(module: ModuleType) -> None:
    for name in _PLUGINS[module.__name__]:
        ours = importlib.import_module(name)
        if hasattr(ours, "register"):  # or it is being imported, and installs at its end
            ours.register(module)


class _Finder:
    """Finds the libraries' modules as the other finders do, and adds the registration to their execution.

    It has what ``importlib.abc.MetaPathFinder`` asks for, and is not derived from it: importing that takes longer than
    the rest of ``import lowbit``.
    """

    def __init__(self) -> None:
        self._searching: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a module that lowbit waits for, ``None`` for all others."""
        if name not in _PLUGINS or name in self._searching:
            return None
        self._searching.add(name)
        try:
            spec = _ask_other_finders(name, path, target)
        finally:
            self._searching.discard(name)
        if spec is not None and spec.loader is not None:
            _register_after_execution(spec)
        return spec


def _ask_other_finders(name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        if not isinstance(finder, _Finder):
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                return spec
    return None


def _register_after_execution(spec: ModuleSpec) -> None:
    # Every search makes a loader of its own, so that importlib.reload registers again, once.
    loader = spec.loader
    assert loader is not None
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        _register(module)

    loader.exec_module = exec_module  # type: ignore[method-assign]
