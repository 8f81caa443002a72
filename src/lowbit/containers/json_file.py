"""Configuration files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in ``file``.

    Raises:
        CheckpointError: it is missing or not a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: can't be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: is not a JSON object")
    return content
