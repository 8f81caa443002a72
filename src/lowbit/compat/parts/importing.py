"""What Python keeps of a module that is being imported. Imports nothing."""

from __future__ import annotations

from typing import Any


def is_initializing(module: Any) -> bool:
    """Tell whether a Python module is being imported at this moment, by another thread perhaps."""
    return bool(getattr(module.__spec__, "_initializing", False))
