"""How a pipeline is meant to be run, where that is not what its class does by default.

Its folder says so in ``generation_defaults.json`` beside ``model_index.json``, a file that diffusers does not look at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowbit.containers.json_file import read_json
from lowbit.errors import CheckpointError

FILE_NAME = "generation_defaults.json"
_WHOLE = ("height", "width", "num_inference_steps")


def read_generation_defaults(folder: str | Path) -> dict[str, Any]:
    """Return the pipeline's arguments that have another default than its class gives them; none without the file.

    They are some of ``height`` and ``width`` (of the picture, in pixels), ``num_inference_steps`` and
    ``guidance_scale``.

    Raises:
        CheckpointError: the file holds something else.
    """
    file = Path(folder) / FILE_NAME
    if not file.is_file():
        return {}
    content = read_json(file)
    wrong = [f"{name}: {value!r}" for name, value in content.items() if not _is_valid(name, value)]
    if wrong:
        raise CheckpointError(
            f"{file}: {', '.join(wrong)}: it may hold {', '.join(_WHOLE)} (whole numbers of at least 1) and"
            " guidance_scale (a number)"
        )
    return content


def _is_valid(name: str, value: Any) -> bool:
    if name in _WHOLE:
        return type(value) is int and value >= 1
    return name == "guidance_scale" and type(value) in {int, float} and math.isfinite(value)


def generation_defaults_text(defaults: Mapping[str, Any]) -> str:
    """Return the file's text."""
    return json.dumps(dict(defaults), indent=2) + "\n"
