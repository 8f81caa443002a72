"""Replacing functions of other libraries."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from lowbit.compat.parts.table import PATHS, versions
from lowbit.errors import UnsupportedError


def override(owner: Any, name: str, ours: Callable[..., Any]) -> None:
    """Replace the function or method ``owner.name`` by ``ours``, which gets the original as its first argument; once.

    Of a class method ``ours`` gets the original bound to the class that it is called on, and not the class.

    Raises:
        UnsupportedError: the installed library has no such part.
    """
    _check(owner, name)
    original = getattr(owner, name)
    if hasattr(original, "_lowbit_original"):
        return
    static = inspect.getattr_static(owner, name)

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return ours(original, *args, **kwargs)

    @functools.wraps(original)
    def of_class(kind: type, *args: Any, **kwargs: Any) -> Any:
        return ours(functools.partial(static.__func__, kind), *args, **kwargs)

    replacement._lowbit_original = of_class._lowbit_original = original  # type: ignore[attr-defined]
    kinds: dict[type, Any] = {classmethod: classmethod(of_class), staticmethod: staticmethod(replacement)}
    setattr(owner, name, kinds.get(type(static), replacement))


def _check(owner: Any, name: str) -> None:
    is_class = inspect.isclass(owner)
    path = f"{owner.__module__}:{owner.__qualname__}.{name}" if is_class else f"{owner.__name__}:{name}"
    assert path in PATHS, path
    if not hasattr(owner, name):
        library = path.partition(".")[0]
        raise UnsupportedError(
            f"{library} {version(library)} has no {path}, which lowbit adapts to quantized layers: install a version"
            f" of {library} from {versions(library)}"
        )


def override_property(owner: type, name: str, ours: Callable[..., Any]) -> None:
    """Replace the property ``owner.name`` by ``ours``, which gets its original getter first and the object; once.

    Raises:
        UnsupportedError: the installed library has no such part.
    """
    _check(owner, name)
    original = next(vars(base)[name] for base in owner.__mro__ if name in vars(base))
    if hasattr(original.fget, "_lowbit_original"):
        return

    @functools.wraps(original.fget)
    def replacement(self: Any) -> Any:
        return ours(original.fget, self)

    replacement._lowbit_original = original.fget  # type: ignore[attr-defined]
    setattr(owner, name, property(replacement))
