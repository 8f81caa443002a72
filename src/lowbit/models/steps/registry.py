"""The table of step adapters."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from lowbit.models.steps.base import StepModel

# Pipeline class in diffusers -> (module, class), imported when asked for.
STEP_MODELS: Mapping[str, tuple[str, str]] = {
    "ZImagePipeline": ("lowbit.models.steps.z_image", "ZImageSteps"),
    "QwenImagePipeline": ("lowbit.models.steps.qwen_image", "QwenImageSteps"),
    "FluxPipeline": ("lowbit.models.steps.flux", "FluxSteps"),
}


def find_step_model(pipeline: Any) -> StepModel | None:
    """Return the step adapter of a pipeline, ``None`` if there is none for exactly its class in diffusers."""
    kind = type(pipeline)
    entry = STEP_MODELS.get(kind.__name__)
    if entry is None or not kind.__module__.startswith("diffusers."):
        return None
    module, name = entry
    adapter: type[StepModel] = getattr(importlib.import_module(module), name)
    return adapter()
