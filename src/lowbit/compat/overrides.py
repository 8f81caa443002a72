"""Replacing functions of other libraries."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


def override(owner: Any, name: str, ours: Callable[..., Any]) -> None:
    """Replace the function or method ``owner.name`` by ``ours``, which gets the original as its first argument; once.

    Of a class method ``ours`` gets the bound original and not the class.
    """
    original = getattr(owner, name)
    if hasattr(original, "_lowbit_original"):
        return

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return ours(original, *args, **kwargs)

    replacement._lowbit_original = original  # type: ignore[attr-defined]
    unbound = isinstance(inspect.getattr_static(owner, name), classmethod | staticmethod)
    setattr(owner, name, staticmethod(replacement) if unbound else replacement)
