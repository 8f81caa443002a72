"""diffusers and transformers take a model's dtype for that of its first parameter, which may be quantized data.

Where the first layer is quantized, that is a float8 weight or a float32 scale. Models and pipelines cast inputs to a
model's dtype, so it must be that of activations: of the whole model and of each model within it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn

from lowbit.compat.parts.modules import float32_modules
from lowbit.compat.parts.overrides import override, override_property
from lowbit.quantization.linear import QuantizedLinear


def register(module: ModuleType) -> None:
    """Prepare ``diffusers.models.modeling_utils`` or ``transformers.modeling_utils`` for quantized layers."""
    if module.__name__.startswith("diffusers"):
        override(module, "get_parameter_dtype", _parameter_dtype)
    else:
        override_property(module.PreTrainedModel, "dtype", _model_dtype)


def _parameter_dtype(original: Callable[[nn.Module], torch.dtype], model: nn.Module) -> torch.dtype:
    """Return the dtype of the first floating parameter, of a quantized layer that of its activations."""
    if not any(isinstance(module, QuantizedLinear) for module in model.modules()):
        return original(model)
    return _first_dtype(model, float32_modules(model)) or original(model)


def _model_dtype(original: Callable[[Any], torch.dtype], model: Any) -> torch.dtype:
    """Return the same for a model of transformers, which passes no float32 modules over."""
    return _first_dtype(model, ()) or original(model)


def _first_dtype(model: nn.Module, passed_over: Sequence[str]) -> torch.dtype | None:
    for prefix, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            return module.compute_dtype
        for name, tensor in module.named_parameters(recurse=False):
            if tensor.is_floating_point() and not any(part in f"{prefix}.{name}" for part in passed_over):
                dtype: torch.dtype = tensor.dtype
                return dtype
    return None
