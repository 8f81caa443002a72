"""diffusers takes the dtype of a model for that of its first parameter, which may be a quantized layer's float8 weight.

Pipelines cast a model's inputs to its dtype, so it must be that of activations.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import nn

from lowbit.compat.overrides import override
from lowbit.quantization.linear import QuantizedLinear


def register(module: ModuleType) -> None:
    """Prepare ``diffusers.models.modeling_utils`` for quantized layers."""
    override(module, "get_parameter_dtype", _parameter_dtype)


def _parameter_dtype(original: Callable[[nn.Module], torch.dtype], model: nn.Module) -> torch.dtype:
    """Return the dtype of the first floating parameter, of a quantized layer that of its activations."""
    if not any(isinstance(module, QuantizedLinear) for module in model.modules()):
        return original(model)
    float32 = getattr(model, "_keep_in_fp32_modules", None) or ()
    for prefix, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            return module.compute_dtype
        for name, tensor in module.named_parameters(recurse=False):
            if tensor.is_floating_point() and not any(part in f"{prefix}.{name}" for part in float32):
                dtype: torch.dtype = tensor.dtype
                return dtype
    return original(model)
