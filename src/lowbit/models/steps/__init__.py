"""Step adapters: a family's generation as four verbs, each equal to its part of the diffusers pipeline's ``__call__``.

The verbs run on a ``StepState``, which owns all that changes during a generation. ``find_step_model`` returns the
adapter of a pipeline.
"""

from lowbit.models.steps.base import StepModel, StepState
from lowbit.models.steps.registry import STEP_MODELS, find_step_model

__all__ = ["STEP_MODELS", "StepModel", "StepState", "find_step_model"]
